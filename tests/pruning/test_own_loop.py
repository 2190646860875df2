"""A loop of the user's own around the pruner: mixed precision, accumulation, schedulers, soft targets, regression."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatprune
from flatprune.flatness.spectrum import Flatness
from flatprune.pruning.pruner import Pruner
from flatprune.pruning.targets import Target
from kfac_ext import Curvature
from tests.pruning.pruning_networks import Run, chain, digits, mlp, sgd

STEPS = 60


class Loop:
    """A small network with everything that acts on it; `batches` yields x, y."""

    def __init__(self, model: nn.Module, make_optimizer=sgd, **curvature: object) -> None:
        self.model = model.train()
        self.optimizer = make_optimizer(model)
        generator = torch.Generator().manual_seed(0)
        self.curvature = Curvature(model, generator=generator, **curvature)  # type: ignore[arg-type]
        self.flatness = Flatness(self.curvature, total_steps=STEPS, start=0.05)
        self.pruner = Pruner(
            model, self.optimizer, self.curvature, digits()[0][:2], target=Target(0.4), total_steps=STEPS
        )

    def batches(self, steps: int = STEPS // 2, size: int = 64):
        x, y = digits()
        for step in range(steps):
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(step))[:size]
            yield x[order], y[order]

    def objective(self, x: Tensor, target: Tensor, criterion=F.cross_entropy) -> Tensor:
        logits = self.model(x)
        loss = criterion(logits, target)
        return loss + self.flatness.penalty(x, logits, loss)

    def end(self) -> None:
        assert self.pruner.params <= 1.01 * 0.4 * self.pruner.params_start
        assert all(bool(p.isfinite().all()) for p in self.model.parameters())
        assert bool(self.curvature.factors.buffer.isfinite().all())
        assert self.curvature.spectral_radius() > 0


@pytest.mark.parametrize("fisher_type", ["true", "empirical"])
def test_bfloat16_autocast(fisher_type):
    loop = Loop(chain(), fisher_type=fisher_type)
    for x, y in loop.batches():
        loop.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            objective = loop.objective(x, y)
        objective.backward()
        loop.optimizer.step()
        loop.pruner.step()
    loop.end()


@pytest.mark.parametrize("fused", [False, True])
def test_float16_with_a_grad_scaler_that_skips_steps(fused):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)  # too much: the first steps overflow
    loop = Loop(
        mlp(),
        lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused),
        fisher_type="empirical",
        grad_scale=scaler.get_scale,
    )
    scales = []
    for x, y in loop.batches():
        loop.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            objective = loop.objective(x, y)
        scaler.scale(objective).backward()
        scaler.step(loop.optimizer)
        scales.append(scaler.get_scale())
        scaler.update()
        loop.pruner.step()
    assert scaler.get_scale() < scales[0]  # a step was skipped, and the removals happened all the same
    loop.end()


def test_the_loop_of_the_documentation():
    page = (Path(__file__).parents[2] / "docs/training.md").read_text()
    code = page.split("```python")[1].split("```")[0]
    for written, here in (("steps = 2, 1000", "steps = 2, 60"), ("lr=1e-3", "lr=1e-2"), ("params=0.1", "params=0.5")):
        assert written in code
        code = code.replace(written, here)
    model, x, y = mlp(), *digits()
    orders = [torch.randperm(len(x), generator=torch.Generator().manual_seed(step))[:64] for step in range(STEPS)]
    names = {
        "torch": torch,
        "flatprune": flatprune,
        "device": "cpu",
        "criterion": nn.CrossEntropyLoss(),
        "model": model,
        "x": x,
        "loader": [(x[order], y[order]) for order in orders],
    }
    exec(code, names)
    pruner, average = names["pruner"], names["average"].module
    assert pruner.params <= 1.01 * 0.5 * pruner.params_start and pruner.step_count == STEPS
    assert names["curvature"].step_count == 2 * STEPS and names["scheduler"].last_epoch == STEPS
    for found, own in zip(average.parameters(), model.parameters()):
        assert found.shape == own.shape and bool(found.isfinite().all())
    right = (average(x).argmax(1) == y).double().mean()
    assert float(right) > 0.6  # of ten classes, after 60 steps


def test_grad_scale_leaves_empirical_factors_as_they_are():
    found = []
    for scale in (1.0, 256.0):
        torch.manual_seed(0)
        model = mlp()
        curvature = Curvature(model, fisher_type="empirical", grad_scale=scale)
        (scale * F.cross_entropy(model(digits()[0][:64]), digits()[1][:64])).backward()
        found.append(curvature.factors.buffer.clone())
    torch.testing.assert_close(found[0], found[1])
    assert float(found[0].abs().sum()) > 0


def test_gradients_accumulated_over_a_removal_are_cut():
    loop = Loop(mlp())
    parts = 3
    for number, (x, y) in enumerate(loop.batches(steps=parts * STEPS // 2)):
        (loop.objective(x, y) / parts).backward()
        if number % parts == parts - 1:
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        elif number % parts == 0:
            loop.pruner.step()  # between two parts: the gradients of the first are in the parameters
            assert all(p.grad.shape == p.shape and bool(p.grad.any()) for p in loop.model.parameters())
    loop.end()


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=STEPS),
        lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS),
            ],
            milestones=[10],
        ),
    ],
)
def test_schedulers_do_not_notice_a_removal(make):
    loop, other = Loop(mlp()), sgd(mlp())
    scheduler, undisturbed = make(loop.optimizer), make(other)
    for x, y in loop.batches():
        loop.optimizer.zero_grad()
        loop.objective(x, y).backward()
        loop.optimizer.step()
        other.step()
        loop.pruner.step()
        scheduler.step()
        undisturbed.step()
        assert [g["lr"] for g in loop.optimizer.param_groups] == [g["lr"] for g in other.param_groups]
    loop.end()


@pytest.mark.parametrize("fisher_type", ["true", "empirical"])
def test_soft_targets(fisher_type):
    loop = Loop(mlp(), fisher_type=fisher_type)
    for x, y in loop.batches():
        onehot = F.one_hot(y, 10).float()
        mixed, targets = 0.7 * x + 0.3 * x.flip(0), 0.7 * onehot + 0.3 * onehot.flip(0)
        loop.optimizer.zero_grad()
        loop.objective(mixed, targets, lambda f, t: F.cross_entropy(f, t, label_smoothing=0.1)).backward()
        loop.optimizer.step()
        loop.pruner.step()
    loop.end()


@pytest.mark.parametrize("fisher_type", ["true", "empirical"])
def test_regression(fisher_type):
    loop = Loop(mlp(), loss="mse", fisher_type=fisher_type)
    losses = []
    for x, _ in loop.batches():
        loop.optimizer.zero_grad()
        objective = loop.objective(x, x.flatten(1)[:, 10:20], F.mse_loss)
        objective.backward()
        losses.append(objective.item())
        loop.optimizer.step()
        loop.pruner.step()
    loop.end()
    assert losses[-1] < 0.7 * losses[0]


def test_a_compiled_model_is_refused_and_its_plain_one_is_not():
    model = mlp()
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match=r"compiled by torch\.compile"):
        Curvature(compiled)
    with pytest.raises(ValueError, match="curvature belongs to another model"):
        Pruner(compiled, sgd(model), Curvature(model), digits()[0][:2], target=Target(0.5), total_steps=10)


@pytest.mark.filterwarnings("ignore")
def test_compiled_after_the_pruner_it_trains_as_the_plain_one():
    torch.compiler.reset()
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        run = Run(mlp(10, 8)).prune(20, params=0.5)
        forward = torch.compile(run.model, backend="aot_eager") if compiled else run.model
        for step in range(8):
            run.optimizer.zero_grad()
            F.cross_entropy(forward(digits()[0][step::40]), digits()[1][step::40]).backward()
            run.optimizer.step()
            run.pruner.step()
        assert run.pruner.params <= 1.01 * 0.5 * run.pruner.params_start
        found.append([*run.model.parameters(), run.curvature.factors.buffer])
    for plain, other in zip(*found):
        torch.testing.assert_close(other, plain)
