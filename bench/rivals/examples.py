"""That a rival does in our loop what it does in its own script: the same network and images, twice.

The scripts are written as the rivals' READMEs have them, on scikit-learn's digits, with their own example settings.
Both ways have to give the same final network, number by number.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.rivals.cuts import cut_by, outputs_of
from bench.rivals.method import LR, MOMENTUM, Method, is_installed
from bench.rivals.methods.oto import OTO, _make_usable
from bench.rivals.methods.torch_pruning_magnitude import OneShot, _maker
from bench.rivals.tasks import Task
from bench.rivals.training import Training
from flatprune.data import Dataset, batch_indices
from flatprune.models import parameter_count
from flatprune.training.builders import parameter_groups
from flatprune.training.evaluation import accuracy, predictions

TASK = Task("digits", "digits", 8, "convnet", (8, 8, 12, 12, 16, 16), train_size=1280, epochs=4)
SEED = 11
OTO_OPTIONS = {"variant": "sgd", "lr": 0.1, "target_group_sparsity": 0.7, "start_pruning_step": 10}
OTO_OPTIONS |= {"pruning_steps": 10, "pruning_periods": 2}  # the tutorial's 10 epochs of 10, in steps
RATIO = 0.5  # of channels, Torch-Pruning's README


def _batches(data: Dataset) -> Any:
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(TASK.epochs):
        for index in batch_indices(torch.randperm(len(data.x_train), generator=generator), TASK.batch_size):
            yield data.x_train[index], data.y_train[index]


def oto_script(data: Dataset) -> nn.Module:
    """README of only-train-once, "Minimal usage example", with the tutorial's start and periods."""
    _make_usable()
    import only_train_once

    torch.manual_seed(SEED)
    model = TASK.network(data)
    oto = only_train_once.OTO(model=model, dummy_input=data.x_train[:1])
    optimizer = oto.hesso(**OTO_OPTIONS)
    model.train()
    for x, y in _batches(data):
        loss = F.cross_entropy(model.forward(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        oto.construct_subnet(out_dir=folder)
        return torch.load(oto.compressed_model_path, weights_only=False)


class _OTOExample(OTO):
    options = OTO_OPTIONS

    def rate(self, progress: float) -> float:
        return 1.0


def torch_pruning_script(data: Dataset) -> nn.Module:
    """README of Torch-Pruning, "High-level pruners": half of the channels, between two trainings."""
    import torch_pruning as tp

    torch.manual_seed(SEED)
    model = TASK.network(data)
    steps = list(_batches(data))
    _fit(model, steps[: len(steps) // 2])
    pruner = tp.pruner.MagnitudePruner(
        model,
        data.x_train[:2],
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=RATIO,
        ignored_layers=outputs_of(model, data.classes),
    )
    pruner.step()
    _fit(model, steps[len(steps) // 2 :])
    return model


def _fit(model: nn.Module, steps: list[tuple[Tensor, Tensor]]) -> None:
    optimizer = torch.optim.SGD(parameter_groups(model, 5e-4), lr=LR, momentum=MOMENTUM)
    model.train()
    for x, y in steps:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


class _TorchPruningExample(OneShot):
    def rate(self, progress: float) -> float:
        return 1.0

    def after_step(self, run: Training) -> None:
        if run.step == self.cut_at:
            cut_by(RATIO, run.model, _maker(run))
            run.renew_optimizer()


EXAMPLES: dict[str, tuple[type[Method], Callable[[Dataset], nn.Module]]] = {
    "oto": (_OTOExample, oto_script),
    "torch-pruning": (_TorchPruningExample, torch_pruning_script),
}


def compare(name: str) -> int:
    """Train both ways and print what each gives; exit code 1 where the networks differ."""
    method, script = EXAMPLES[name]
    if not is_installed(method):
        print(f"{name}: {method.distribution} is not installed, not run")
        return 2
    torch.set_num_threads(1)
    data = TASK.data(Path(), SEED, validation=False)
    with contextlib.redirect_stdout(io.StringIO()):  # HESSO tells its plans
        own = script(data)
        run = Training(TASK, data, method(method.knob.recommended), "params", 1.0, SEED)
        run.train()
    for title, model in (("its own script", own), ("our loop", run.model)):
        score = accuracy(predictions(model, data.x_test), data.y_test)
        print(f"{name}, {title}: {parameter_count(model):,} parameters, {score:.2f} % of the test images")
    same = _equal(own, run.model)
    print("the same network" if same else "the networks differ")
    return 0 if same else 1


def _equal(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)
