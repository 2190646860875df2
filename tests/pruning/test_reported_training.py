"""Networks on which other pruners failed while training went on: pruned to half and trained, whatever runs later."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatprune

STEPS = 8


class Regularised(nn.Module):
    """A decoder that runs in training alone keeps the hidden layer informative."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(20, 16), nn.Linear(16, 12), nn.Linear(12, 5)
        self.decoder = nn.Linear(16, 20)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.a(x))
        if self.training:
            self.extra = F.mse_loss(self.decoder(hidden), x)
        return self.head(F.relu(self.b(hidden)))


class Routed(nn.Module):
    """One of four experts for each sample; two samples cannot reach them all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.router = nn.Linear(20, 16), nn.Linear(20, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU()) for _ in range(4)
        )
        self.body, self.head = nn.Linear(10, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden, (share, choice) = F.relu(self.stem(x)), self.router(x).softmax(1).max(1)
        rows = [self.experts[int(k)](hidden[n]) * share[n] for n, k in enumerate(choice)]
        return self.head(F.relu(self.body(torch.stack(rows))))


class Checked(nn.Module):
    """Asserts the width of its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(20, 16), nn.Linear(16, 12), nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.a(x))
        assert hidden.shape[-1] == 16, "wrong width"
        return self.head(F.relu(self.c(F.relu(self.b(hidden)))))


class Dropped(nn.Module):
    """Dropout in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(20, 16), nn.Linear(16, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.dropout(F.relu(self.a(x)), 0.3))))


class Halves(nn.Module):
    """Half of a layer is worked on, both halves and what became of it are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.m, self.b, self.head = nn.Linear(20, 16), nn.Linear(8, 8), nn.Linear(24, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(F.silu(self.a(x)).chunk(2, 1))
        parts.append(F.silu(self.m(parts[-1])))
        return self.head(F.relu(self.b(torch.cat(parts, 1))))


class Vectors(nn.Module):
    """A layer scale and a norm without a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.head = nn.Linear(20, 16), nn.RMSNorm(16), nn.Linear(16, 16), nn.Linear(16, 5)
        self.gamma = nn.Parameter(torch.full((16,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(x + self.gamma * self.b(F.relu(self.norm(x))))


class Case(NamedTuple):
    """A network, layers that must lose neurons, and layers that may stay with words of the reason."""

    build: type[nn.Module]
    narrower: set[str]
    refused: tuple[str, str] | None = None


CASES = [
    Case(Regularised, {"b"}, ("a", "gets no gradient")),  # its loss is not one of the output, of which factors are
    Case(Routed, {"body"}),
    Case(Checked, {"b", "c"}, ("a", "wrong width")),
    Case(Dropped, {"a", "b"}),
    Case(Halves, {"a", "m", "b"}),
    Case(Vectors, {"a", "b"}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.build.__name__)
def test_pruned_to_half_while_it_trains(case):
    model = case.build()
    before = {name: layer.weight.shape[0] for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        curvature = flatprune.Curvature(model, factor_update_steps=2)
        pruner = flatprune.Pruner(
            model, optimizer, curvature, torch.randn(2, 20), target=flatprune.Target(params=0.5), total_steps=STEPS
        )
        for _ in range(STEPS):
            x, y = torch.randn(32, 20), torch.randint(0, 5, (32,))
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y) + getattr(model, "extra", 0.0)
            loss.backward()
            optimizer.step()
            pruner.step()
    assert loss.isfinite()
    after = {name: layer.weight.shape[0] for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert {name for name in case.narrower if after[name] < before[name]} == case.narrower
    assert model.eval()(torch.randn(64, 20)).shape == (64, 5)
    if case.refused:
        layer, words = case.refused
        assert words in pruner.refused[layer]


def test_the_warning_names_the_layers_and_the_true_reason():
    """Keys and values of grouped queries, all numbers of heads written into the code."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = {"i": (8, 16), "q": (16, 16), "k": (16, 8), "v": (16, 8), "o": (16, 16), "head": (16, 5)}
            for name, (inputs, outputs) in sizes.items():
                setattr(self, name, nn.Linear(inputs, outputs))

        def forward(self, x: Tensor) -> Tensor:
            x = self.i(x)
            n, t, _ = x.shape
            q = self.q(x).view(n, t, 4, 4).transpose(1, 2)
            k, v = (f(x).view(n, t, 2, 4).transpose(1, 2).repeat_interleave(2, 1) for f in (self.k, self.v))
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, 16)
            return self.head((x + self.o(y)).mean(1))

    model = Block()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        pruner = flatprune.Pruner(
            model,
            None,
            flatprune.Curvature(model),
            torch.randn(2, 6, 8),
            target=flatprune.Target(params=0.9),
            total_steps=STEPS,
        )
    text = " ".join(str(warning.message) for warning in told)
    assert "'q'" in text
    for name in "qkv":
        assert "output of the model" not in pruner.refused[name]
        assert "view" in pruner.refused[name]
