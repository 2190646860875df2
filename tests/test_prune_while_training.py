"""One object in a loop of one's own: what its parts do alone, resumed, told of on a logger, closed."""

import inspect
import io
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flatprune
from flatprune.prune_while_training import PrunerArguments
from flatprune.pruning.learning_rate import LR_SCHEDULES, rate_factor
from tests.pruning.pruning_networks import chain, digits, mlp, sgd

STEPS = 40


def made(build=chain, **options):
    torch.manual_seed(0)
    model = build().train()
    optimizer = sgd(model)
    options = {"target": 0.4, "curvature": {"generator": torch.Generator().manual_seed(0)}, **options}
    return (
        model,
        optimizer,
        flatprune.PruneWhileTraining(model, optimizer, digits()[0][:2], total_steps=STEPS, **options),
    )


def train(model, optimizer, pruning, steps):
    x, y = digits()
    for step in steps:
        rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(step))[:64]
        outputs = model(x[rows])
        loss = pruning.loss(x[rows], outputs, F.cross_entropy(outputs, y[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruning.step()


def test_checkers_know_the_arguments_of_the_pruner():
    own = {"model", "optimizer", "curvature", "example_inputs", "target", "total_steps"}
    of_pruner = inspect.signature(flatprune.Pruner).parameters
    wanted = {name: parameter.annotation for name, parameter in of_pruner.items() if name not in own}
    assert {name: hint.__forward_arg__ for name, hint in PrunerArguments.__annotations__.items()} == wanted


def test_it_does_what_its_parts_do(caplog):
    with caplog.at_level(logging.INFO, logger="flatprune"):
        model, optimizer, pruning = made()
        train(model, optimizer, pruning, range(STEPS))
    torch.manual_seed(0)
    other = chain().train()
    trained = sgd(other)
    curvature = flatprune.Curvature(other, generator=torch.Generator().manual_seed(0))
    flatness = flatprune.Flatness(curvature, total_steps=STEPS)
    x, y = digits()
    target = flatprune.Target(params=0.4)
    pruner = flatprune.Pruner(other, trained, curvature, x[:2], target=target, total_steps=STEPS)
    for step in range(STEPS):
        rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(step))[:64]
        logits = other(x[rows])
        loss = F.cross_entropy(logits, y[rows])
        trained.zero_grad()
        (loss + flatness.penalty(x[rows], logits, loss)).backward()
        trained.step()
        pruner.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    events = [record.step for record in pruner.history]
    assert len(caplog.records) == len(set(events)) and pruning.finished
    assert "parameters (" in caplog.records[0].getMessage()


def test_it_resumes_bit_for_bit():
    model, optimizer, pruning = made(lr_schedule="flat_cosine")
    train(model, optimizer, pruning, range(20))
    file = io.BytesIO()
    parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "pruning": pruning.state_dict()}
    torch.save(parts, file)
    train(model, optimizer, pruning, range(20, STEPS))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = chain().train()
    flatprune.take_tensors(again, saved["model"], attributes=saved["pruning"]["attributes"])
    trained = sgd(again)
    resumed = flatprune.PruneWhileTraining(
        again, trained, digits()[0][:2], target=0.4, total_steps=STEPS, lr_schedule="flat_cosine"
    )
    trained.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["pruning"])
    train(again, trained, resumed, range(20, STEPS))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert resumed.summary() == pruning.summary()


def test_a_state_of_other_parts_is_refused():
    state = made(mlp)[2].state_dict()
    model = made(mlp, flatness=False)[2]
    with pytest.raises(ValueError, match="flatness is not in use, but in the state"):
        model.load_state_dict(state)
    with pytest.raises(ValueError, match="lr_scheduler is in use, but not in the state"):
        made(mlp, lr_schedule="cosine")[2].load_state_dict(state)


def test_the_rate_of_a_loop_warms_up():
    _, optimizer, _ = made(mlp, lr_schedule="flat_cosine", lr_warmup=0.5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(optimizer.param_groups[0]["initial_lr"] / (0.5 * STEPS))
    with pytest.raises(ValueError, match=r"lr_warmup is 0\.5 without an lr_schedule, expected both"):
        made(mlp, lr_warmup=0.5)


def test_the_rate_of_a_loop_grows_as_the_network_shrinks():
    model, optimizer, pruning = made(mlp, lr_schedule="flat_cosine", lr_growth=0.5)
    with pytest.raises(ValueError, match=r"lr_growth is 0\.5 without an lr_schedule, expected both"):
        made(mlp, lr_growth=0.5)
    before = sum(p.numel() for p in model.parameters())
    train(model, optimizer, pruning, range(STEPS // 2))
    now = sum(p.numel() for p in model.parameters())
    end = pruning.lr_scheduler.prune_end
    settings = flatprune.Settings(data="digits", model="mlp", optimizer="adam", prune_end=end)
    wanted = settings.learning_rate(STEPS // 2, STEPS, optimizer.param_groups[0]["initial_lr"], now / before)
    assert now < before and optimizer.param_groups[0]["lr"] == pytest.approx(wanted)
    later = flatprune.PruningLR(sgd(model), STEPS, growth=0.5)
    later.load_state_dict(pruning.lr_scheduler.state_dict())
    assert later.parameters_start == before


def test_the_summary_says_sizes_target_and_widths():
    model, optimizer, pruning = made(mlp, flatness={"strength": 0.1})
    before = sum(p.numel() for p in model.parameters())
    assert "not done yet" in pruning.summary()
    train(model, optimizer, pruning, range(STEPS))
    text = pruning.summary()
    after = sum(p.numel() for p in model.parameters())
    assert text.startswith(f"{after:,} of {before:,} parameters") and "not done yet" not in text
    for name, width in pruning.pruner.widths().items():
        assert any(line.split()[0] == name and line.split()[-1] == str(width) for line in text.splitlines()[2:])


def test_without_flatness_the_loss_stays_the_loss():
    model, _, pruning = made(mlp, flatness=False)
    x, y = digits()
    outputs = model(x[:8])
    loss = F.cross_entropy(outputs, y[:8])
    assert torch.equal(pruning.loss(x[:8], outputs, loss), loss)


def test_a_logger_that_cannot_be_told_is_refused():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="logger is 'runs', expected one with a method log"):
        flatprune.PruneWhileTraining(model, optimizer, torch.randn(2, 4), target=0.5, total_steps=9, logger="runs")
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_is_closed_or_refused_leaves_no_hook():
    model, _, pruning = made(mlp)
    pruning.close()
    assert not model._forward_hooks and not model._forward_pre_hooks
    model = mlp()
    with pytest.raises(ValueError, match=r"Target: params is 1\.5"):
        flatprune.PruneWhileTraining(model, sgd(model), digits()[0][:2], target=1.5, total_steps=STEPS)
    with pytest.raises(KeyError, match="nowhere"):
        flatprune.PruneWhileTraining(
            model, sgd(model), digits()[0][:2], target=0.5, total_steps=STEPS, exclude=["nowhere"]
        )
    assert not model._forward_hooks and not model._forward_pre_hooks


@pytest.mark.parametrize("schedule", LR_SCHEDULES)
def test_learning_rates_are_those_of_a_run(schedule):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    scheduler = flatprune.PruningLR(optimizer, 20, schedule, prune_end=0.3)
    settings = flatprune.Settings(data="digits", model="mlp", schedule=schedule, prune_end=0.3)
    for step in range(23):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(settings.learning_rate(min(step, 19), 20, 0.3))
        optimizer.step()
        scheduler.step()
    assert rate_factor(schedule, 0, 20, 0.3) == 1.0


@pytest.mark.parametrize("schedule", LR_SCHEDULES)
def test_learning_rates_warm_up(schedule):
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0)
    scheduler = flatprune.PruningLR(optimizer, 20, schedule, prune_end=0.5, warmup=0.2)
    settings = flatprune.Settings(data="digits", model="mlp", schedule=schedule, prune_end=0.5, warmup=0.2)
    for step in range(20):
        factor = rate_factor(schedule, step, 20, 0.5) * min(1.0, (step + 1) / 4)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(factor)
        assert settings.learning_rate(step, 20, 1.0) == pytest.approx(factor)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": "linear"}, "schedule is 'linear', expected one of flat_cosine, cosine"),
        ({"total_steps": 0}, "total_steps is 0"),
        ({"prune_end": 1.0}, "prune_end is 1.0"),
        ({"warmup": 1.0}, "warmup is 1.0, expected 0 <= warmup < 1"),
        ({"growth": -0.5}, "growth is -0.5, expected 0 <= growth <= 1"),
        ({"growth": 1.5}, "growth is 1.5, expected 0 <= growth <= 1"),
        ({"growth": float("nan")}, "growth is nan, expected 0 <= growth <= 1"),
        ({"growth": "auto"}, "growth is 'auto', expected 0 <= growth <= 1"),
    ],
)
def test_learning_rates_that_are_none(options, words):
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.3)
    with pytest.raises(ValueError, match=words):
        flatprune.PruningLR(optimizer, **{"total_steps": 20, **options})
