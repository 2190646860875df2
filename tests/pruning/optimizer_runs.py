"""Small perceptrons in training with one optimizer or several and a pruner, and what these keep."""

from __future__ import annotations

import copy
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatprune

STEPS = 6
SGD = torch.optim.SGD


def net(*widths: int) -> nn.Sequential:
    """A perceptron; by default all its hidden weights are of different shapes."""
    sizes = [20, *(widths or (32, 24)), 5]
    layers = [layer for i, o in itertools.pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def square() -> nn.Sequential:
    """Every weight is [12, 12], the last one too."""
    return nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(12, 12, bias=False), nn.Tanh())][:-1])


class Trained:
    """A network, its optimizers and a pruner, on random data."""

    def __init__(self, model: nn.Sequential, optimizers, given="same", loss=F.cross_entropy, **options) -> None:
        self.model, self.loss = model, loss
        self.optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        self.curvature = flatprune.Curvature(model, factor_update_steps=2)
        self.pruner = flatprune.Pruner(
            model,
            optimizers if given == "same" else given,
            self.curvature,
            torch.randn(2, model[0].in_features),
            target=flatprune.Target(params=0.5),
            total_steps=STEPS,
            **options,
        )

    def backward(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        x, y = torch.randn(16, self.model[0].in_features), torch.randint(0, 5, (16,))
        self.loss(self.model(x), y).backward()

    def train(self, steps: int = STEPS) -> Trained:
        for _ in range(steps):
            self.backward()
            for optimizer in self.optimizers:
                optimizer.step()
            self.pruner.step()
        return self

    def check(self) -> None:
        assert self.pruner.params <= 1.01 * 0.5 * self.pruner.params_start
        self.backward()  # once more, with what was cut at the end
        for optimizer in self.optimizers:
            optimizer.step()
        assert all(bool(p.isfinite().all()) for p in self.model.parameters())


def muon_and_adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    return [torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW(others)]


def states_of(optimizers: list[torch.optim.Optimizer]) -> list:
    return copy.deepcopy([[o.state[p] for g in o.param_groups for p in g["params"]] for o in optimizers])


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
