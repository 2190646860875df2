"""Networks whose layers read all layers before them, by concatenation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flatprune.models.shapes import checked_widths, need_size

DENSENET_WIDTHS = (16, 12, 12, 12)
DENSENET_LAYERS = 12  # a block; three blocks, two transitions, stem and classifier are 40 layers


class DenseLayer(nn.Module):
    """Batch norm, ReLU and a 3x3 convolution, whose output is joined to its input."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(in_channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, in_channels, h, w] to [n, in_channels + growth, h, w]."""
        return torch.cat([x, self.conv(self.relu(self.bn(x)))], dim=1)


def densenet40(image_shape: tuple[int, int, int], classes: int, widths: Sequence[int] | None = None) -> nn.Module:
    """DenseNet-40 with k = 12 (Huang et al. 2017); `widths` = (16, 12, 12, 12): the stem and the growth of each block.

    Transitions keep the number of channels.
    """
    need_size("densenet40", image_shape)
    features, *growths = checked_widths("densenet40", widths, DENSENET_WIDTHS)
    layers: list[nn.Module] = [nn.Conv2d(image_shape[0], features, 3, padding=1, bias=False)]
    for block, growth in enumerate(growths):
        if block:
            transition = nn.Conv2d(features, features, 1, bias=False)
            layers += [nn.BatchNorm2d(features), nn.ReLU(), transition, nn.AvgPool2d(2)]
        for _ in range(DENSENET_LAYERS):
            layers.append(DenseLayer(features, growth))
            features += growth
    layers += [nn.BatchNorm2d(features), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(features, classes))
