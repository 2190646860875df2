"""Small networks with every kind of coupling, and a few steps of training on scikit-learn's digits."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from flatprune import models
from flatprune.coupling import Coupling, NeuronGroup, find_coupling
from flatprune.criteria import ScoringContext
from flatprune.pruning.pruner import Pruner
from flatprune.pruning.targets import Target
from kfac_ext import Curvature
from tests.coupling.oracle import mask, tensors_of


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """1,797 images [n, 1, 8, 8] of mean 0 and deviation 1, and their labels."""
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None]
    return (x - x.mean()) / x.std(), torch.tensor(data.target)


def mlp(*widths: int) -> nn.Module:
    return models.build("mlp", (1, 8, 8), 10, widths or (24, 16))


def chain() -> nn.Module:
    """Convolutions with batch norm (one with a bias too), in-place ReLU, pooling and a flatten of 4x4 positions."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12 * 16, 20),
        nn.ReLU(),
        nn.Linear(20, 10),
    )


def resnet() -> nn.Module:
    """A residual network of three stages with one block each; the first stage has an identity shortcut."""
    return models.ResNet(1, 10, 1, (8, 8, 12))


def resnet20() -> nn.Module:
    return models.build("resnet20", (1, 8, 8), 10, (8, 8, 12))


class Depthwise(nn.Module):
    """Pointwise - depthwise - pointwise with batch norm and PReLU, then global pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(1, 12, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.norm = nn.BatchNorm2d(12)
        self.act = nn.PReLU(12)
        self.project = nn.Conv2d(12, 16, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.depthwise(self.expand(x))))
        return self.head(torch.relu(self.norm2(self.project(x))).mean((2, 3)))


class Grouped(nn.Module):
    """A convolution of three groups between others, read by one and reading one, and one layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 12, 3, padding=1)
        self.grouped = nn.Conv2d(12, 18, 3, padding=1, groups=3, bias=False)
        self.norm = nn.BatchNorm2d(18)
        self.mix = nn.Conv2d(18, 10, 1)
        self.twice = nn.Conv2d(10, 10, 3, padding=1)
        self.head = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.grouped(torch.relu(self.first(x)))))
        x = torch.relu(self.mix(x))
        x = torch.relu(self.twice(torch.relu(self.twice(x))))
        return self.head(x.mean((2, 3)))


class Concat(nn.Module):
    """Two branches joined by a concatenation, a gated pair of halves, and a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(1, 6, 3, padding=1)
        self.right = nn.Conv2d(1, 8, 1)
        self.join = nn.Conv2d(14, 10, 3, padding=1)
        self.gate = nn.Conv2d(10, 16, 1)
        self.after = nn.Conv2d(8, 9, 1)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(9, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.join(torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], dim=1)))
        value, gate = self.gate(x).chunk(2, dim=1)
        return self.head(torch.relu(self.after(value * torch.sigmoid(gate))).mean((2, 3)))


class Sequence(nn.Module):
    """Convolutions over sequences: strided, grouped, depthwise, a residual sum, then a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(8, 12, 3, padding=1)
        self.norm = nn.BatchNorm1d(12)
        self.depthwise = nn.Conv1d(12, 12, 3, padding="same", groups=12)
        self.grouped = nn.Conv1d(12, 16, 3, stride=2, padding=1, groups=2, bias=False)
        self.again = nn.Conv1d(16, 16, 3, padding=2, dilation=2, padding_mode="circular")
        self.head = nn.Linear(16 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x[:, 0])))
        x = torch.relu(self.grouped(self.depthwise(x)))
        return self.head(torch.relu(self.again(x) + x).flatten(1))


class Transposed(nn.Module):
    """Down and up again: a transposed convolution between convolutions, a grouped one and a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 12, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(12, 10, 3, stride=2, padding=1, output_padding=1, bias=False)
        self.norm = nn.BatchNorm2d(10)
        self.depthwise = nn.ConvTranspose2d(10, 10, 3, padding=1, groups=10)
        self.grouped = nn.ConvTranspose2d(10, 8, 2, stride=2, groups=2)
        self.mix = nn.Conv2d(8, 9, 3, stride=2)
        self.head = nn.Linear(9, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.up(torch.relu(self.down(x)))))
        x = torch.relu(self.grouped(self.depthwise(x)))
        return self.head(torch.relu(self.mix(x)).mean((2, 3)))


class JointNorms(nn.Module):
    """Group norms of four, of one and of as many groups as channels, then layer norms."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 12, 3, padding=1)
        self.four = nn.GroupNorm(4, 12)
        self.second = nn.Conv2d(12, 10, 3, stride=2)
        self.one = nn.GroupNorm(1, 10)
        self.third = nn.Conv2d(10, 8, 1)
        self.each = nn.GroupNorm(8, 8)
        self.fourth = nn.Linear(72, 14)
        self.layer = nn.LayerNorm(14)
        self.fifth = nn.Linear(14, 12)
        self.plain = nn.LayerNorm(12, bias=False)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.four(self.first(x)))
        x = torch.relu(self.one(self.second(x)))
        x = torch.relu(self.each(self.third(x))).flatten(1)
        x = torch.relu(self.layer(self.fourth(x)))
        return self.head(self.plain(torch.tanh(self.fifth(x))))


class Attention(nn.Module):
    """Self-attention as timm writes it, over the rows of the image, in a residual sum with an MLP behind it."""

    class Heads(nn.Module):
        def __init__(self, width: int, num_heads: int, head_dim: int) -> None:
            super().__init__()
            self.num_heads, self.head_dim = num_heads, head_dim
            self.qkv = nn.Linear(width, 3 * num_heads * head_dim)
            self.proj = nn.Linear(num_heads * head_dim, width)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
            x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return self.proj(x)

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 12)
        self.position = nn.Parameter(torch.randn(8, 12))
        self.norm = nn.LayerNorm(12)
        self.attn = self.Heads(12, 6, 4)
        self.mlp = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 30), nn.GELU(), nn.Linear(30, 12))
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x[:, 0]) + self.position
        x = x + self.attn(self.norm(x))
        return self.head((x + self.mlp(x)).mean(1))


NETWORKS = {
    "mlp": mlp,
    "chain": chain,
    "resnet": resnet,
    "depthwise": Depthwise,
    "grouped": Grouped,
    "concat": Concat,
    "sequence": Sequence,
    "transposed": Transposed,
    "norms": JointNorms,
    "attention": Attention,
}


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)


class Run:
    """A model in training with its curvature and, after `prune`, a pruner; batches depend on the step alone."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.model = model.train()
        self.optimizer = optimizer or sgd(model)
        self.curvature = Curvature(model, generator=torch.Generator().manual_seed(0))
        self.pruner: Pruner | None = None
        self.step_count = 0
        self.dtype = next(model.parameters()).dtype

    def prune(self, total_steps: int, params: float = 0.3, target: Target | None = None, **options: object) -> Run:
        x, _ = digits()
        self.pruner = Pruner(
            self.model,
            self.optimizer,
            self.curvature,
            x[:2],
            target=target or Target(params),
            total_steps=total_steps,
            **options,  # type: ignore[arg-type]
        )
        return self

    @functools.cached_property
    def groups(self) -> list[NeuronGroup]:
        """Found once: of a network that is looked at, and keeps its widths."""
        return find_coupling(self.model, digits()[0][:2].to(self.dtype)).groups

    def train(self, steps: int, batch: int = 64) -> list:
        x, y = digits()
        records = []
        for _ in range(steps):
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.step_count))[:batch]
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(x[order].to(self.dtype)), y[order])
            loss.backward()
            self.optimizer.step()
            self.step_count += 1
            if self.pruner is not None:
                records += self.pruner.step()
        return records


def context_of(run: Run, seed: int = 0, step: int = 0) -> ScoringContext:
    return ScoringContext(run.model, run.groups, run.curvature, seed=seed, step=step)


@contextmanager
def masked(
    model: nn.Module, coupling: Coupling, pruned: Mapping[int, Tensor], where_made: bool = False
) -> Iterator[None]:
    """The model computes what it does without the neurons; see `tests.coupling.oracle.mask`."""
    before = {name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}
    handles = mask(model, coupling, pruned, where_made)
    yield
    for handle in handles:
        handle.remove()
    for name, tensor in tensors_of(model).items():
        tensor.data = before[name]
