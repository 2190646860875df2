"""Plain PyTorch for vectors, tables, points and games; adapters and gates."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from bench.zoo.network import Builder, Network, normal

CLASSES = 5


def perceptron(*widths: int, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with an activation between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), act()]
    return nn.Sequential(*layers[:-1])


class Recommender(nn.Module):
    """DLRM: embedded categories and a perceptron of numbers, all their products, another perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(50, 16, mode="sum") for _ in range(3))
        self.bottom = perceptron(8, 32, 16)
        self.top = perceptron(16 + 6, 32, 2)

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        """Logits [n, 2] of [n, 8] and [n, 3, 2]."""
        x = self.bottom(numbers)
        all_ = torch.stack([x, *(table(c) for table, c in zip(self.tables, categories.unbind(1)))], 1)
        row, column = torch.tril_indices(4, 4, -1)
        return self.top(torch.cat([x, (all_ @ all_.mT)[:, row, column]], 1))


class Factorization(nn.Module):
    """Users and things as vectors whose products are ratings."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.things = nn.Embedding(50, 24), nn.Embedding(60, 24)

    def forward(self, users: Tensor, things: Tensor) -> Tensor:
        """Ratings [n, things of each] of [n] and [n, k]."""
        return (self.users(users)[:, None] * self.things(things)).sum(-1)


class Points(nn.Module):
    """PointNet: a perceptron of each point and the largest of every feature, with a learnt rotation of the features."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU())
        self.transform = nn.Sequential(nn.Conv1d(16, 32, 1), nn.ReLU(), nn.AdaptiveMaxPool1d(1), nn.Flatten())
        self.matrix = nn.Linear(32, 16 * 16)
        self.second = nn.Sequential(nn.Conv1d(16, 64, 1), nn.BatchNorm1d(64), nn.ReLU())
        self.head = perceptron(64, 32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes] of points [n, 3, p]."""
        x = self.first(x)
        matrix = self.matrix(self.transform(x)).unflatten(1, (16, 16)) + torch.eye(16, dtype=x.dtype)
        return self.head(self.second(matrix @ x).amax(-1))


class Field(nn.Module):
    """NeRF: a deep perceptron whose input joins in again half-way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = perceptron(12, 48, 48), perceptron(60, 48, 48)
        self.density, self.colour = nn.Linear(48, 1), perceptron(48, 24, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Colour and density [n, 4] of [n, 12]."""
        y = torch.relu(self.second(torch.cat([torch.relu(self.first(x)), x], -1)))
        return torch.cat([self.colour(y).sigmoid(), self.density(y)], -1)


class Duel(nn.Module):
    """A duelling Q-network: the value of a state, and the advantage of each action over their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.value, self.advantage = (
            perceptron(10, 48, 32),
            perceptron(32, 24, 1),
            perceptron(32, 24, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Values of actions [n, actions]."""
        x = torch.relu(self.body(x))
        advantage = self.advantage(x)
        return self.value(x) + advantage - advantage.mean(1, keepdim=True)


class Highway(nn.Module):
    """Layers that mix their output with their input by a gate, 1 - t and t."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.layers, self.gates = (nn.ModuleList(nn.Linear(32, 32) for _ in range(3)) for _ in range(2))
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes]."""
        x = self.first(x)
        for layer, gate in zip(self.layers, self.gates):
            t = gate(x).sigmoid()
            x = t * torch.relu(layer(x)) + (1 - t) * x
        return self.head(x)


class Adapted(nn.Module):
    """LoRA: a frozen layer plus a product of two thin ones, the second of which starts at zero."""

    def __init__(self, inputs: int, outputs: int, rank: int = 4) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.A, self.B = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5), nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        return self.base(x) + x @ self.A.T @ self.B.T


class ReZero(nn.Module):
    """Residual blocks behind a scalar that starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(16, 32), nn.Linear(32, CLASSES)
        self.blocks = nn.ModuleList(perceptron(32, 48, 32, act=nn.GELU) for _ in range(3))
        self.scales = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes]."""
        x = self.first(x)
        for block, scale in zip(self.blocks, self.scales):
            x = x + scale * block(x)
        return self.head(x)


class Modulated(nn.Module):
    """FiLM: a condition gives scale and shift of each channel of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.condition = nn.Linear(6, 48)
        self.first, self.norm = nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24, affine=False)
        self.second, self.head = nn.Conv2d(24, 32, 3, 2, 1), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Logits [n, classes]."""
        scale, shift = self.condition(condition)[:, :, None, None].chunk(2, 1)
        x = torch.relu(self.norm(self.first(x)) * (1 + scale) + shift)
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


class Sets(nn.Module):
    """Deep sets with attention pooling: weights over the elements of a set, a weighted sum."""

    def __init__(self) -> None:
        super().__init__()
        self.element, self.weight, self.head = perceptron(8, 32, 32), nn.Linear(32, 1), perceptron(32, 24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes] of sets [n, k, 8]."""
        x = torch.relu(self.element(x))
        return self.head((self.weight(torch.tanh(x)).softmax(1) * x).sum(1))


def rows(n: int) -> tuple[Tensor, Tensor]:
    """Numbers and categories."""
    return torch.randn(n, 8), torch.randint(0, 50, (n, 3, 2))


def ratings(n: int) -> tuple[Tensor, Tensor]:
    """A user and six things each."""
    return torch.randint(0, 50, (n,)), torch.randint(0, 60, (n, 6))


def conditioned(n: int) -> tuple[Tensor, Tensor]:
    """Images and conditions."""
    return torch.randn(n, 3, 12, 12), torch.randn(n, 6)


NETWORKS: dict[str, Builder] = {
    "plain_perceptron": lambda: Network(perceptron(16, 64, 48, CLASSES), normal(16)),
    "plain_perceptron_norm": lambda: Network(
        nn.Sequential(
            nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 24), nn.RMSNorm(24), nn.Linear(24, CLASSES)
        ),
        normal(16),
    ),
    "plain_autoencoder": lambda: Network(perceptron(32, 24, 8, 24, 32, act=nn.Tanh), normal(32), loss="mse"),
    "plain_recommender": lambda: Network(Recommender(), rows),
    "plain_factorization": lambda: Network(Factorization(), ratings, loss="mse"),
    "plain_points": lambda: Network(Points(), normal(3, 20)),
    "plain_field": lambda: Network(Field(), normal(12), loss="mse"),
    "plain_duel": lambda: Network(Duel(), normal(10), loss="mse"),
    "plain_highway": lambda: Network(Highway(), normal(16)),
    "plain_lora": lambda: Network(
        nn.Sequential(Adapted(16, 48), nn.ReLU(), Adapted(48, 32), nn.ReLU(), nn.Linear(32, CLASSES)), normal(16)
    ),
    "plain_rezero": lambda: Network(ReZero(), normal(16)),
    "plain_film": lambda: Network(Modulated(), conditioned),
    "plain_sets": lambda: Network(Sets(), normal(10, 8)),
}
