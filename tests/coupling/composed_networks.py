"""Networks composed at random of everything that couples neurons: blocks over images, then over tokens, then a head.

Each block maps `channels` to `self.channels` and, over images, keeps or changes their size; what it is made of comes
from a `random.Random`, so that hypothesis can shrink a failing network.
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE = (3, 8, 8)


def divisors(n: int) -> list[int]:
    """Proper divisors above 1 that leave two channels a slice."""
    return [d for d in (2, 3, 4) if n % d == 0 and n // d > 1]


def convolution(draw: random.Random, inputs: int, outputs: int) -> nn.Module:
    size = draw.choice((1, 3))
    mode = draw.choice(("zeros", "circular", "reflect"))
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, padding_mode=mode, bias=draw.random() < 0.7)


class LastDimensionNorm(nn.Module):
    """A layer or root mean square norm over the channels of an image."""

    def __init__(self, draw: random.Random, channels: int) -> None:
        super().__init__()
        self.norm = draw.choice((nn.LayerNorm, nn.RMSNorm))(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def norm(draw: random.Random, channels: int) -> nn.Module:
    kind = draw.choice(("none", "batch", "group", "channels", "last", "instance"))
    if kind == "group":
        return nn.GroupNorm(draw.choice([1, *divisors(channels)]), channels)
    if kind == "last":
        return LastDimensionNorm(draw, channels)
    kinds = {"batch": nn.BatchNorm2d, "channels": lambda c: nn.GroupNorm(c, c), "instance": nn.InstanceNorm2d}
    return kinds[kind](channels) if kind in kinds else nn.Identity()


def activation(draw: random.Random, channels: int) -> nn.Module:
    return draw.choice((nn.ReLU(), nn.ReLU(inplace=True), nn.SiLU(), nn.PReLU(channels), nn.PReLU(), nn.Identity()))


class ImageBlock(nn.Module):
    """One block over [N, C, H, W]."""

    kinds = (
        "chain", "residual", "projection", "concatenation", "dense", "depthwise", "multiplied", "grouped", "twice",
        "gate", "transposed", "grouped_transposed", "excite", "spatial_gate", "chunk", "c2f", "shuffle",
        "pixel_shuffle", "pixel_unshuffle", "scale", "einsum", "padded", "positions", "flip", "doubled", "part",
    )  # fmt: skip

    def __init__(self, draw: random.Random, channels: int, size: int) -> None:
        super().__init__()
        kind = draw.choice(self.kinds)
        groups = divisors(channels)
        needs_groups = ("grouped", "grouped_transposed", "shuffle")
        odd = kind in ("chunk", "c2f", "part") and channels % 2
        if (kind in needs_groups and not groups) or odd or (kind == "pixel_shuffle" and (channels % 4 or channels < 8)):
            kind = "chain"
        if kind in ("dense", "doubled", "concatenation", "multiplied", "pixel_unshuffle", "c2f") and channels > 16:
            kind = "chain"
        if kind == "pixel_unshuffle" and size % 2:
            kind = "chain"
        width = draw.choice((4, 6, 8))
        self.kind, self.width, self.part = kind, width, channels // 2
        self.groups = draw.choice(groups) if groups else 1
        self.size = {"pixel_shuffle": 2 * size, "pixel_unshuffle": size // 2}.get(kind, size)
        same = (
            "residual",
            "depthwise",
            "twice",
            "excite",
            "spatial_gate",
            "shuffle",
            "scale",
            "positions",
            "flip",
            "part",
        )
        out = channels if kind in same else width
        self.channels = {
            "concatenation": 2 * width,
            "dense": channels + width,
            "multiplied": 2 * channels,
            "pixel_shuffle": channels // 4,
            "pixel_unshuffle": 4 * channels,
            "doubled": 2 * channels,
            "padded": width + 2,
            "c2f": width,
        }.get(kind, out)
        if kind in ("grouped", "grouped_transposed"):
            self.channels = out = self.groups * draw.choice((2, 3))
        getattr(self, f"_make_{kind}", self._make_chain)(draw, channels, out)
        self.norm, self.act = norm(draw, self.channels), activation(draw, self.channels)

    def _make_chain(self, draw: random.Random, channels: int, out: int) -> None:
        self.first = convolution(draw, channels, out)
        self.second = convolution(draw, channels, out)

    def _make_depthwise(self, draw: random.Random, channels: int, out: int) -> None:
        self.first = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=draw.random() < 0.5)

    def _make_multiplied(self, draw: random.Random, channels: int, out: int) -> None:
        self.first = nn.Conv2d(channels, 2 * channels, 3, padding=1, groups=channels)

    def _make_grouped(self, draw: random.Random, channels: int, out: int) -> None:
        self.first = nn.Conv2d(channels, out, 3, padding=1, groups=self.groups)

    def _make_transposed(self, draw: random.Random, channels: int, out: int) -> None:
        self.first = nn.ConvTranspose2d(channels, out, 3, padding=1)

    def _make_grouped_transposed(self, draw: random.Random, channels: int, out: int) -> None:
        self.first = nn.ConvTranspose2d(channels, out, 3, padding=1, groups=self.groups)

    def _make_gate(self, draw: random.Random, channels: int, out: int) -> None:
        self.first = convolution(draw, channels, 2 * out)

    def _make_excite(self, draw: random.Random, channels: int, out: int) -> None:
        self.first = nn.Sequential(nn.Linear(channels, 5), nn.ReLU(), nn.Linear(5, channels))

    def _make_spatial_gate(self, draw: random.Random, channels: int, out: int) -> None:
        self.first = nn.Conv2d(channels, 1, 1)

    def _make_chunk(self, draw: random.Random, channels: int, out: int) -> None:
        self.first, self.second = convolution(draw, channels // 2, out), convolution(draw, channels // 2, out)

    def _make_c2f(self, draw: random.Random, channels: int, out: int) -> None:
        self.first = convolution(draw, channels // 2, out)
        self.second = convolution(draw, channels + out, out)

    def _make_shuffle(self, draw: random.Random, channels: int, out: int) -> None:
        self.first = nn.ChannelShuffle(self.groups)

    def _make_pixel_shuffle(self, draw: random.Random, channels: int, out: int) -> None:
        self.first = nn.PixelShuffle(2)

    def _make_pixel_unshuffle(self, draw: random.Random, channels: int, out: int) -> None:
        self.first = nn.PixelUnshuffle(2)

    def _make_scale(self, draw: random.Random, channels: int, out: int) -> None:
        self.vector = nn.Parameter(torch.rand(channels, 1, 1) + 0.5)

    def _make_einsum(self, draw: random.Random, channels: int, out: int) -> None:
        self.matrix = nn.Parameter(torch.randn(channels, out))

    def _make_positions(self, draw: random.Random, channels: int, out: int) -> None:
        self.vector = nn.Parameter(torch.randn(1, channels, self.size, self.size))

    def _make_flip(self, draw: random.Random, channels: int, out: int) -> None:
        pass

    _make_doubled = _make_flip

    def _make_part(self, draw: random.Random, channels: int, out: int) -> None:
        self.first = convolution(draw, self.part, self.part)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(getattr(self, f"_{self.kind}", self._plain)(x)))

    def _plain(self, x: Tensor) -> Tensor:
        return self.first(x)

    def _residual(self, x: Tensor) -> Tensor:
        return x + self.first(x)

    def _projection(self, x: Tensor) -> Tensor:
        return self.second(x) + self.first(x)

    def _concatenation(self, x: Tensor) -> Tensor:
        return torch.cat([self.second(x), self.first(x)], 1)

    def _dense(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.first(x)], 1)

    def _twice(self, x: Tensor) -> Tensor:
        return self.first(torch.tanh(self.first(x)))

    def _gate(self, x: Tensor) -> Tensor:
        return F.glu(self.first(x), 1)

    def _excite(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.first(x.mean((2, 3))))[:, :, None, None]

    def _spatial_gate(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.first(x))

    def _chunk(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        return self.first(left) + self.second(right)

    def _c2f(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        return self.second(torch.cat([left, right, self.first(right)], 1))

    def _scale(self, x: Tensor) -> Tensor:
        return x * self.vector

    def _positions(self, x: Tensor) -> Tensor:
        return x + self.vector

    def _einsum(self, x: Tensor) -> Tensor:
        return torch.einsum("nchw,cd->ndhw", x, self.matrix)

    def _padded(self, x: Tensor) -> Tensor:
        return F.pad(self.first(x), (0, 0, 0, 0, 1, 1))

    def _flip(self, x: Tensor) -> Tensor:
        return x.flip(1)

    def _doubled(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.tanh()], 1)

    def _part(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, : self.part] = self.first(x[:, : self.part])
        return x


class TokenBlock(nn.Module):
    """One block over [N, T, C], before or after a norm, with or without a residual sum."""

    kinds = ("attention", "fused", "shared_keys", "one_head", "perceptron", "gated", "one_gated", "tokens", "linear")

    def __init__(self, draw: random.Random, channels: int, tokens: int) -> None:
        super().__init__()
        self.kind = draw.choice(self.kinds)
        self.num_heads, self.head_dim = draw.choice((2, 3, 4)), draw.choice((1, 2, 3))
        self.residual = self.kind == "tokens" or draw.random() < 0.6
        self.channels = channels if self.residual else draw.choice((4, 6, 8))
        self.norm = draw.choice((nn.LayerNorm, nn.RMSNorm, lambda c: nn.Identity()))(channels)
        self.scale = nn.Parameter(torch.rand(self.channels) + 0.5) if draw.random() < 0.3 else None
        inner, hidden = self.num_heads * self.head_dim, draw.choice((5, 7))
        out = self.channels
        if self.kind == "shared_keys":
            self.queries = draw.choice((2, 3))
            self.q, self.k, self.v = (
                nn.Linear(channels, self.queries * inner),
                nn.Linear(channels, inner),
                nn.Linear(channels, inner),
            )
            self.out = nn.Linear(self.queries * inner, out)
        elif self.kind == "one_head":
            self.q, self.k, self.v = nn.Linear(channels, inner), nn.Linear(channels, inner), nn.Linear(channels, hidden)
            self.out = nn.Linear(hidden, out)
        elif self.kind == "attention":
            self.q, self.k, self.v = nn.Linear(channels, inner), nn.Linear(channels, inner), nn.Linear(channels, inner)
            self.out = nn.Linear(inner, out)
        elif self.kind == "fused":
            self.qkv, self.out = nn.Linear(channels, 3 * inner), nn.Linear(inner, out)
        elif self.kind == "tokens":
            self.first, self.out = nn.Linear(tokens, hidden), nn.Linear(hidden, tokens)
        elif self.kind == "linear":
            self.out = nn.Linear(channels, out)
        else:
            self.first = nn.Linear(channels, 2 * hidden if self.kind == "one_gated" else hidden)
            self.second, self.out = nn.Linear(channels, hidden), nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        y = getattr(self, f"_{self.kind}")(self.norm(x))
        y = y if self.scale is None else y * self.scale
        return x + y if self.residual else y

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, self.head_dim)).transpose(1, 2)

    def _joined(self, x: Tensor) -> Tensor:
        return self.out(x.transpose(1, 2).flatten(2))

    def _attention(self, x: Tensor) -> Tensor:
        return self._joined(
            F.scaled_dot_product_attention(*(self._heads(layer(x)) for layer in (self.q, self.k, self.v)))
        )

    def _fused(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return self._joined((q @ k.mT).softmax(-1) @ v)

    def _shared_keys(self, x: Tensor) -> Tensor:
        q, k, v = (self._heads(layer(x)) for layer in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(self.queries, 1) for t in (k, v))
        return self._joined(F.scaled_dot_product_attention(q, k, v))

    def _one_head(self, x: Tensor) -> Tensor:
        return self.out((self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x))

    def _perceptron(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.first(x)))

    def _gated(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.first(x)) * self.second(x))

    def _one_gated(self, x: Tensor) -> Tensor:
        gate, value = self.first(x).chunk(2, 2)
        return self.out(torch.sigmoid(gate) * value)

    def _tokens(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.first(x.mT))).mT

    def _linear(self, x: Tensor) -> Tensor:
        return self.out(x)


class ComposedNetwork(nn.Module):
    """A stem, blocks over images, blocks over tokens perhaps, a hidden layer and a head."""

    def __init__(self, draw: random.Random, image_blocks: int = 3, token_blocks: int = 2) -> None:
        super().__init__()
        size, channels = IMAGE[1], draw.choice((6, 8))
        self.stem = nn.Conv2d(IMAGE[0], channels, 1)
        self.images, self.tokens = nn.ModuleList(), nn.ModuleList()
        for _ in range(draw.randint(0, image_blocks)):
            block = ImageBlock(draw, channels, size)
            channels, size = block.channels, block.size
            self.images.append(block)
        self.pool = 2 if size >= 8 else 1
        tokens = (size // self.pool) ** 2
        self.end = draw.choice(("mean", "flat", "tokens"))
        if self.end == "tokens":
            self.position = nn.Parameter(torch.randn(1, tokens, channels)) if draw.random() < 0.5 else None
            self.token = nn.Parameter(torch.randn(1, 1, channels)) if draw.random() < 0.5 else None
            tokens += self.token is not None
            for _ in range(draw.randint(1, token_blocks)):
                self.tokens.append(TokenBlock(draw, channels, tokens))
                channels = self.tokens[-1].channels
        self.hidden = nn.Linear(channels * tokens if self.end == "flat" else channels, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.images:
            x = block(x)
        x = F.max_pool2d(x, self.pool)
        if self.end == "mean":
            x = x.mean((2, 3))
        elif self.end == "flat":
            x = x.flatten(1)
        else:
            x = x.flatten(2).mT
            x = x if self.position is None else x + self.position
            x = x if self.token is None else torch.cat([self.token.expand(len(x), -1, -1), x], 1)
            for block in self.tokens:
                x = block(x)
            x = x[:, 0]
        return self.head(torch.relu(self.hidden(x)))


def composed(draw: random.Random) -> tuple[ComposedNetwork, Tensor]:
    """A network in float64 whose norms are not the identity, and four images."""
    torch.manual_seed(0)
    model = ComposedNetwork(draw).double()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval(), torch.randn(4, *IMAGE, dtype=torch.float64)
