"""What the options of the training loop do: optimizers, soft targets, averages, parts of a batch, precision."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import flatprune.flatness.sam
import flatprune.flatness.spectrum
import kfac_ext.curvature.guard
import kfac_ext.curvature.shared
from flatprune.data import load_dataset
from flatprune.errors import DivergedError
from flatprune.export import load
from flatprune.runs import run
from flatprune.settings import Settings
from flatprune.training import builders
from flatprune.training.batches import Batch, mixed
from flatprune.training.evaluation import evaluate
from flatprune.training.gradients import Gradients
from flatprune.training.state import EpochSums
from flatprune.training.trainer import Observer, Trainer
from kfac_ext import Curvature

CPU = torch.device("cpu")
CONVNET = {"model": "convnet", "widths": (4, 4, 6, 6, 8, 8)}


@pytest.fixture
def trainer(npz):
    """Makes a trainer on small images; six steps an epoch."""

    def make(**settings):
        values = {"data": str(npz()), "batch_size": 16, "epochs": 10, "target_params": 0.3, **settings}
        return Trainer(Settings(**values), load_dataset(values["data"]))

    return make


class EachStep(Observer):
    def __init__(self, action):
        self.step = action


# optimizers


@pytest.mark.parametrize(
    ("name", "kind", "decay"),
    [("sgd", torch.optim.SGD, 5e-4), ("adam", torch.optim.Adam, 5e-4), ("adamw", torch.optim.AdamW, 0.01)],
)
def test_optimizers(trainer, name, kind, decay):
    optimizer = trainer(optimizer=name, momentum=0.7).optimizer
    assert type(optimizer) is kind
    weights, rest = optimizer.param_groups
    assert (weights["weight_decay"], rest["weight_decay"]) == (decay, 0.0)
    assert weights["lr"] == (0.05 if name == "sgd" else 1e-3)
    assert weights.get("momentum", weights.get("betas", (0,))[0]) == 0.7
    assert trainer(optimizer=name, weight_decay=0.0, lr=0.3).optimizer.param_groups[0]["weight_decay"] == 0.0


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_states_are_cut_and_images_learned(trainer, name):
    run = trainer(optimizer=name, lr=0.01)
    run.train()
    assert run.params <= 1.01 * 0.3 * run.params_before
    for parameter in run.model.parameters():
        state = run.optimizer.state[parameter]
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
    assert run.history[-1]["test_accuracy"] > 90.0


# soft targets


def test_mixup_mixes_images_and_labels_alike():
    x, y = torch.randn(64, 3), torch.arange(64) % 4
    fractions = []
    for seed in range(50):
        batch = mixed(x, y, 4, 0.4, torch.Generator().manual_seed(seed))
        torch.testing.assert_close(batch.target.sum(1), torch.ones(64))
        assert torch.equal(batch.target.argmax(1), y) and batch.labels is y
        fraction = batch.target.max(1).values.min()
        fractions.append(fraction)
        # x' - s x = (1 - s) x[p]: among the images, and with the label that the target names
        rest = (batch.x - fraction * x) / (1 - fraction) if fraction < 0.99 else None
        if rest is not None:
            distance, other = torch.cdist(rest, x).min(1)
            assert float(distance.max()) < 1e-2
            onehot = F.one_hot(y, 4).float()
            torch.testing.assert_close(batch.target, fraction * onehot + (1 - fraction) * onehot[other])
    # E max(b, 1 - b) of Beta(0.4, 0.4), by numbers
    draws = torch.distributions.Beta(0.4, 0.4).sample((20000,))
    assert float(torch.stack(fractions).mean()) == pytest.approx(
        float(torch.maximum(draws, 1 - draws).mean()), abs=0.06
    )


@pytest.mark.parametrize("options", [{"mixup": 0.4}, {"label_smoothing": 0.1}])
def test_soft_targets_reach_the_loss(trainer, options):
    hard, soft = trainer(), trainer(**options)
    hard.train()
    soft.train()
    assert soft.history[-1]["train_loss"] > hard.history[-1]["train_loss"] + 0.1  # soft targets cannot be met
    assert soft.history[-1]["test_accuracy"] > 90.0


# averages


def test_the_average_is_tested_and_saved(npz, tmp_path):
    settings = Settings(data=str(npz()), batch_size=16, epochs=3, target_params=1.0, ema=0.9)
    expected, trainers = {}, []

    def follow(trainer):
        trainers.append(trainer)
        step, state = trainer.progress.step - 1, trainer.model.state_dict()
        decay = min(0.9, (1 + step) / (10 + step))
        for name, value in state.items():
            past = expected.get(name, initial[name])
            expected[name] = decay * past + (1 - decay) * value

    dataset = load_dataset(settings.data)
    initial = {name: value.clone() for name, value in Trainer(settings, dataset).model.state_dict().items()}
    summary = run(settings, tmp_path / "out", observer=lambda _: EachStep(follow))
    saved = load(tmp_path / "out")
    for name, value in saved.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(value, trainers[-1].model.state_dict()[name])
    assert summary["test_accuracy_last"] == evaluate(saved, dataset.x_test, dataset.y_test)[0]


@pytest.mark.parametrize("options", [{}, {"compensate": "on", "optimum_shift": "after_pruning"}])
def test_the_average_loses_the_same_neurons(trainer, options):
    run = trainer(ema=0.9, model="convnet", widths=(8,) * 6, **options)
    run.train()
    own, average = run.model.state_dict(), run.result.state_dict()
    assert run.result is not run.model and run.params <= 1.01 * 0.3 * run.params_before
    assert {name: value.shape for name, value in own.items()} == {name: v.shape for name, v in average.items()}
    for name, value in own.items():
        if value.dim() > 1:
            assert 0 < (average[name] - value).norm() < 0.5 * value.norm()


# a batch in parts


def gradients_of(model, batches):
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    sums, losses = EpochSums(CPU), []
    criterion = nn.CrossEntropyLoss()
    Gradients(model, criterion, CPU, "off", scaler, None, None, None, losses.append).compute(batches, sums)
    return [p.grad.clone() for p in model.parameters()], sums.figures()


def test_parts_have_the_gradient_and_the_figures_of_the_whole():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(24, 6), torch.randint(3, (24,))
    whole, figures = gradients_of(model, [Batch(x, y, y)])
    found, same = gradients_of(model, [Batch(*part) for part in zip(x.chunk(4), y.chunk(4), y.chunk(4))])
    for part, expected in zip(found, whole):
        torch.testing.assert_close(part, expected)
    assert same == pytest.approx(figures, rel=1e-6)


def test_parts_have_the_factors_of_the_whole():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    twin = copy.deepcopy(model)
    plan = builders.BatchInParts(4, lambda: 3, 0.95)
    split = Curvature(model, factor_update_steps=plan.update_steps, factor_decay=plan.decay)
    whole = Curvature(twin, factor_update_steps=3, factor_decay=0.95)
    for _ in range(8):
        x = torch.randn(24, 6)
        twin(x)
        for part in x.chunk(4):
            model(part)
        torch.testing.assert_close(split.factors["0.A"], whole.factors["0.A"])
        torch.testing.assert_close(split.factors["2.A"], whole.factors["2.A"])
    assert split.step_count == 4 * whole.step_count == 32
    for layer in ("0", "2"):  # of labels drawn in another order
        G, expected = split.factors[f"{layer}.G"], whole.factors[f"{layer}.G"]
        assert (G - expected).norm() < 0.3 * expected.norm()


def test_the_trainer_splits_a_batch(trainer):
    seen = []
    run = trainer(accumulate=4, epochs=2)
    run.model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])) if module.training else None)
    run.train()
    assert run.progress.step == 12 and run.curvature.step_count == 48
    assert set(seen) == {4}
    assert run.params <= 1.01 * 0.3 * run.params_before


# precision, memory format, compilation


@pytest.mark.parametrize(("amp", "dtype"), [("off", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_forwards_in_mixed_precision(trainer, amp, dtype):
    run, seen = trainer(amp=amp, epochs=4, flatness="off"), set()

    def look(module, args, output):
        if module.training:
            seen.add(output.dtype)

    run.model.register_forward_hook(look)
    run.train()
    assert seen == {dtype}
    assert all(p.dtype == torch.float32 for p in run.model.parameters())
    assert run.history[-1]["test_accuracy"] > 80.0


def test_fp16_scales_the_loss_and_skips_a_step_that_overflows(trainer):
    run, after = trainer(amp="fp16", epochs=5, target_params=1.0), []
    run.scaler.load_state_dict({**run.scaler.state_dict(), "scale": 2.0**30})
    before = [p.detach().clone() for p in run.model.parameters()]
    run.train(EachStep(lambda trainer: after.append([p.detach().clone() for p in trainer.model.parameters()])))
    assert all(torch.equal(p, q) for p, q in zip(before, after[0]))
    assert not torch.equal(before[0], after[-1][0])
    assert run.scaler.get_scale() < 2.0**30


def strides(tensor):
    """Those that count: a dimension of size 1 may have any."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape) if size > 1]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_channels_last_outlives_a_removal(trainer, optimizer):
    run, seen = trainer(channels_last=True, model="resnet20", epochs=3, optimizer=optimizer, compensate="on"), set()

    def look(module, args, output):
        if module.training and output.shape[1] > 1 and output.shape[2] > 1:
            seen.add(output.is_contiguous(memory_format=torch.channels_last))

    for module in run.model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(look)
    run.train()
    assert seen == {True} and run.params <= 1.01 * 0.3 * run.params_before
    for parameter in run.model.parameters():
        if parameter.dim() == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last)
        for state in run.optimizer.state[parameter].values():  # fused optimizers want the same strides
            assert state is None or state.dim() == 0 or strides(state) == strides(parameter)


@pytest.mark.filterwarnings("ignore")
def test_compiled_it_trains_as_the_plain_one(trainer, monkeypatch):
    real, compiled = torch.compile, []

    def compile_without_kernels(model):
        compiled.append(model)
        return real(model, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile_without_kernels)
    runs = [trainer(compile=compile, epochs=4, widths=(10, 8), prune_every=4) for compile in (False, True)]
    for one in runs:
        one.train()
    cuts = {record["step"] for record in runs[0].history if record["kind"] == "removal"}
    assert len(compiled) == 1 + len(cuts) > 1
    for plain, other in zip(runs[0].model.parameters(), runs[1].model.parameters()):
        torch.testing.assert_close(other, plain)


# no step waits for the device


WAITING = {
    torch.ops.aten._local_scalar_dense.default,  # .item(), float(), bool()
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
}


class NoWaiting(TorchDispatchMode):
    """Refuses what has to know a value on the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in WAITING, f"{func} waits for the device"
        if func is torch.ops.aten.index.Tensor:
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "an index with a mask waits"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    for module in (
        flatprune.training.state,
        flatprune.flatness.sam,
        flatprune.flatness.spectrum,
        kfac_ext.curvature.guard,
        kfac_ext.curvature.shared,
        kfac_ext.curvature.updates,
        kfac_ext.curvature.label_losses,
    ):
        monkeypatch.setattr(module, "reading_is_free", lambda device: False)
    monkeypatch.setattr(builders, "fused_optimizer", lambda device: True)
    # on the CPU alone torch's looks whether the labels are in range
    monkeypatch.setattr(F, "one_hot", lambda labels, classes: (labels[..., None] == torch.arange(classes)).long())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"augment": True, **CONVNET, "amp": "bf16", "channels_last": True},
        {"optimizer": "adamw", "ema": 0.9, "mixup": 0.4, "label_smoothing": 0.1},
        {"amp": "fp16", "accumulate": 2, "flatness": "sam", "disout": 0.1},
        {"flatness": "msam", "optimizer": "adam"},
    ],
)
def test_no_step_waits_for_the_device(trainer, as_on_a_gpu, options):
    run = trainer(prune_start=0.9, prune_end=0.9, **options)
    step, count = run._train_step, 0

    def without_waiting(index):
        nonlocal count
        if run.progress.step in (0, 53):  # the first factors, and the removal
            return step(index)
        count += 1
        with NoWaiting():
            return step(index)

    run._train_step = without_waiting
    run.train()
    assert count == 58 and run.params <= 1.01 * 0.3 * run.params_before


def test_a_diverging_loss_is_noticed_without_looking_at_each(trainer, as_on_a_gpu):
    run, saved = trainer(lr=1e30, epochs=40, flatness="off", target_params=1.0), []
    with pytest.raises(DivergedError, match=r"the loss became (nan|inf) by step 6 "):
        run.train(save=lambda: saved.append(run.progress.step))
    assert saved == []
