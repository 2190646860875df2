"""The kinds of networks that only-train-once checks itself with: norms behind joins, shared layers, cascades."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.zoo.network import Builder, Network, images

CLASSES = 5


def conv(inputs: int, outputs: int, size: int = 3, **options: int) -> nn.Conv2d:
    """A convolution that keeps the size of the image."""
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


class Joined(nn.Module):
    """Branches joined, normalised together, joined again with what came before, and a pool of one branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = conv(3, 16), conv(16, 12), conv(16, 20, 1)
        self.norm, self.middle = nn.BatchNorm2d(32), conv(32, 24)
        self.outer, self.last = nn.BatchNorm2d(24 + 32 + 16), conv(72, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes]."""
        x = F.relu(self.first(x))
        both = self.norm(torch.cat([self.left(x), self.right(F.avg_pool2d(x, 3, 1, 1))], 1))
        x = torch.cat([self.middle(F.relu(both)), both, x], 1)
        return self.head(F.relu(self.last(self.outer(x))).mean((2, 3)))


class NormedJoins(nn.Module):
    """Group norms over a tensor beside itself, over two branches of other sizes, and over their sum."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = conv(3, 16), conv(32, 32), conv(32, 16)
        self.conv4, self.conv5 = conv(32, 32), conv(32, CLASSES)
        self.norm1 = nn.GroupNorm(groups, 16)
        self.norm2, self.norm3, self.norm4, self.norm5 = (nn.GroupNorm(groups, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes, h, w]."""
        x = F.leaky_relu(self.norm1(self.conv1(x)))
        twice = torch.cat([x, x], 1)
        first = self.norm3(self.conv2(self.norm2(twice)))
        second = self.norm5(self.conv4(self.norm4(torch.cat([self.conv3(twice), x], 1))))
        return self.conv5(first + second)


class TransposedInstances(nn.Module):
    """Instance norms, two of them behind one convolution, around a transposed one; two paths summed."""

    def __init__(self, affine: bool) -> None:
        super().__init__()
        self.first, self.short, self.long1, self.long2 = conv(3, 16), conv(16, 32), conv(16, 24), conv(24, 32)
        self.up = nn.ConvTranspose2d(32, 40, 3, 2, 1)
        self.norm1, self.norm2 = (nn.InstanceNorm2d(16, affine=affine) for _ in range(2))
        self.norm3, self.norm4 = nn.InstanceNorm2d(24, affine=affine), nn.InstanceNorm2d(40, affine=affine)
        self.end1, self.end2, self.head = conv(40, 20), conv(40, 20), nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes]."""
        x = self.first(x)
        short = self.short(F.leaky_relu(self.norm1(x)))
        long = self.long2(F.leaky_relu(self.norm3(self.long1(F.leaky_relu(self.norm2(x))))))
        x = F.leaky_relu(self.norm4(self.up(short + long)))
        return self.head(F.relu(self.end1(x) + self.end2(x)).mean((2, 3)))


class SharedPyramid(nn.Module):
    """One head of convolutions on three sizes of an image's features, each size with norms of its own."""

    def __init__(self, shared_norms: bool) -> None:
        super().__init__()
        self.stem = conv(3, 16)
        self.downs = nn.ModuleList(nn.Conv2d(16, 16, 3, 2, 1) for _ in range(2))
        self.tower, self.head = conv(16, 24), conv(24, CLASSES)
        norms = [nn.BatchNorm2d(24) for _ in range(3)]
        self.norms = nn.ModuleList(norms[:1] * 3 if shared_norms else norms)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes, positions over all sizes]."""
        levels = [F.relu(self.stem(x))]
        for down in self.downs:
            levels.append(F.relu(down(levels[-1])))
        outputs = [self.head(F.relu(norm(self.tower(level)))) for norm, level in zip(self.norms, levels)]
        return torch.cat([output.flatten(2) for output in outputs], 2)


class GroupedChain(nn.Module):
    """Grouped convolutions of several numbers of groups, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.two, self.four = conv(3, 16), conv(16, 24, groups=2), conv(24, 32, groups=4)
        self.depthwise, self.last = conv(32, 32, groups=32), conv(32, 16, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in (16, 24, 32, 32))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes]."""
        for layer, norm in zip((self.first, self.two, self.four, self.depthwise), self.norms):
            x = F.relu(norm(layer(x)))
        return self.head(F.relu(self.last(x)).mean((2, 3)))


class SeveralInputs(nn.Module):
    """Three images of other numbers of channels, normalised and joined before the first convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.BatchNorm2d(13)
        self.encoder = nn.ModuleList([conv(13, 16), conv(16, 24)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(16), nn.BatchNorm2d(24)])
        self.decoder, self.out = conv(24 + 16, 16), conv(16, 3)

    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """An image [n, 3, h, w]."""
        x = self.entry(torch.cat([a, b, c], 1))
        features = []
        for layer, norm in zip(self.encoder, self.norms):
            x = F.leaky_relu(norm(layer(x)))
            features.append(x)
        return self.out(F.leaky_relu(self.decoder(torch.cat(features, 1))))


class Cascade(nn.Module):
    """CARN: every block's output joins all that came before and goes through a 1x1 convolution; pixels shuffled up."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = conv(3, width)
        self.blocks = nn.ModuleList(nn.ModuleList([conv(width, width), conv(width, width)]) for _ in range(3))
        self.merges = nn.ModuleList(conv((number + 2) * width, width, 1) for number in range(3))
        self.up, self.last = conv(width, 4 * width), conv(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """An image of twice the size."""
        mean = x.mean((2, 3), keepdim=True)
        x = joined = self.first(x - mean)
        for (one, two), merge in zip(self.blocks, self.merges):
            joined = torch.cat([joined, F.relu(two(F.relu(one(x))) + x)], 1)
            x = merge(joined)
        return self.last(F.pixel_shuffle(F.relu(self.up(x)), 2)) + mean


def several(n: int) -> tuple[Tensor, ...]:
    """Images of 3, 4 and 6 channels."""
    return tuple(torch.randn(n, channels, 16, 16) for channels in (3, 4, 6))


NETWORKS: dict[str, Builder] = {
    "join_branches": lambda: Network(Joined(), images(16)),
    "join_groupnorm_4": lambda: Network(NormedJoins(4), images(16)),
    "join_groupnorm_16": lambda: Network(NormedJoins(16), images(16)),
    "join_groupnorm_1": lambda: Network(NormedJoins(1), images(16)),
    "join_transposed": lambda: Network(TransposedInstances(affine=True), images(16)),
    "join_transposed_plain": lambda: Network(TransposedInstances(affine=False), images(16)),
    "join_shared_head": lambda: Network(SharedPyramid(shared_norms=False), images(16)),
    "join_shared_norm": lambda: Network(SharedPyramid(shared_norms=True), images(16)),
    "join_grouped": lambda: Network(GroupedChain(), images(16)),
    "join_inputs": lambda: Network(SeveralInputs(), several, loss="mse"),
    "join_cascade": lambda: Network(Cascade(), images(12), loss="mse"),
}
