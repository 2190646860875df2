"""Networks drawn at random from everything that couples neurons; a seed always draws the same one."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE = (3, 6, 6)


class Norm(nn.Sequential):
    """A batch norm, a group norm or none, and an activation."""

    def __init__(self, draw: random.Random, channels: int) -> None:
        groups = draw.choice([g for g in (1, 2, 4, channels) if channels % g == 0])
        norm = draw.choice([nn.BatchNorm2d(channels), nn.GroupNorm(groups, channels), nn.Identity()])
        super().__init__(norm, draw.choice([nn.ReLU(inplace=True), nn.PReLU(channels), nn.SiLU()]))


class Block(nn.Module):
    """Maps `channels` to `self.channels` in a way that is drawn."""

    kinds = (
        "chain", "residual", "projection", "concat", "dense", "depthwise", "grouped", "twice", "gate", "transposed",
        "excite",
    )  # fmt: skip

    def __init__(self, draw: random.Random, channels: int) -> None:
        super().__init__()
        self.kind = draw.choice(self.kinds)
        if self.kind == "grouped" and channels % 2:
            self.kind = "chain"
        width = channels if self.kind in ("residual", "depthwise", "twice", "excite") else draw.choice((4, 6, 8))
        options = {"padding": 1, "padding_mode": draw.choice(("zeros", "circular")), "bias": draw.random() < 0.5}
        self.width = width
        if self.kind == "depthwise":
            self.first = nn.Conv2d(channels, channels, 3, groups=channels, **options)
        elif self.kind == "grouped":
            self.first = nn.Conv2d(channels, width, 3, groups=2, **options)
        elif self.kind == "transposed":
            self.first = nn.ConvTranspose2d(channels, width, 3, padding=1)
        else:
            self.first = nn.Conv2d(channels, 2 * width if self.kind == "gate" else width, 3, **options)
        self.norm = Norm(draw, width)
        self.second = nn.Conv2d(channels, width, 1)
        self.squeeze = nn.Sequential(nn.Linear(channels, 5), nn.ReLU(), nn.Linear(5, width))
        self.channels = {"concat": 2 * width, "dense": channels + width}.get(self.kind, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.kind == "gate":
            value, gate = y.chunk(2, dim=1)
            y = value * torch.sigmoid(gate)
        y = self.norm(y)
        if self.kind == "twice":
            y = torch.tanh(self.first(y))
        if self.kind == "residual":
            return x + y
        if self.kind == "projection":
            return self.second(x) + y
        if self.kind == "excite":
            return y * torch.sigmoid(self.squeeze(x.mean((2, 3))))[:, :, None, None]
        if self.kind in ("concat", "dense"):
            return torch.cat([self.second(x) if self.kind == "concat" else x, y], dim=1)
        return y


class RandomNetwork(nn.Module):
    """A stem, three blocks, one more convolution that two names share, a head; what a block leaves unused stays so."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.stem = nn.Conv2d(IMAGE[0], 8, 3, padding=1)
        self.stem_norm = Norm(draw, 8)
        self.blocks = nn.ModuleList()
        channels = 8
        for _ in range(3):
            self.blocks.append(Block(draw, channels))
            channels = self.blocks[-1].channels
        self.shared = nn.Conv2d(channels, channels, 1)
        self.alias = self.shared
        self.flat = draw.random() < 0.5
        self.head = nn.Linear(channels * (9 if self.flat else 1), 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x))
        for block in self.blocks:
            x = block(x)
        x = torch.relu(self.alias(torch.relu(self.shared(x))))
        x = F.max_pool2d(x, 2).flatten(1) if self.flat else x.mean((2, 3))
        return self.head(x)


def drawn(seed: int) -> tuple[RandomNetwork, Tensor]:
    torch.manual_seed(seed)
    model, x = RandomNetwork(seed), torch.randn(8, *IMAGE)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    for _ in range(3):
        model(x)
    return model.eval(), x
