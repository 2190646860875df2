"""Residual networks. Shortcuts are 1x1 convolutions, since one that pads with zeros fixes the order of the channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flatprune.models.shapes import checked_widths, need_size


class ResNetPlan(NamedTuple):
    """Blocks in each stage and channels of the stages."""

    blocks: int
    widths: tuple[int, ...]


RESNETS = {
    "resnet20": ResNetPlan(3, (16, 32, 64)),
    "resnet32": ResNetPlan(5, (16, 32, 64)),
    "resnet44": ResNetPlan(7, (16, 32, 64)),
    "resnet56": ResNetPlan(9, (16, 32, 64)),
    "resnet110": ResNetPlan(18, (16, 32, 64)),
    "wide_resnet32": ResNetPlan(5, (64, 128, 256)),
    "resnet18": ResNetPlan(2, (64, 128, 256, 512)),
}
# (expansion, blocks, stride of the first) of each stage; the two first strides are those for small images
MOBILENET_STAGES = ((1, 1, 1), (6, 2, 1), (6, 3, 2), (6, 4, 2), (6, 3, 1), (6, 3, 2), (6, 1, 1))
MOBILENET_WIDTHS = (32, 16, 24, 32, 64, 96, 160, 320, 1280)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around a shortcut (He et al. 2016)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, in_channels, h, w] to [n, channels, h / stride, w / stride]."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """Residual network for small images: a 3x3 stem, one stage a width, each at half the size of the last, average."""

    def __init__(self, channels: int, classes: int, blocks: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        stages, features = [], widths[0]
        for stage, width in enumerate(widths):
            stride = 1 if stage == 0 else 2
            stages.append(nn.Sequential(BasicBlock(features, width, stride)))
            stages[-1].extend(BasicBlock(width, width, 1) for _ in range(blocks - 1))
            features = width
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes] of images [n, channels, h, w]."""
        out = self.stages(self.relu(self.bn(self.conv(x))))
        return self.fc(torch.flatten(self.pool(out), 1))


def resnet(
    image_shape: tuple[int, int, int], classes: int, widths: Sequence[int] | None = None, *, name: str
) -> nn.Module:
    """Residual network of He et al. 2016 with the stem for CIFAR; `widths`: the channels of its stages.

    (16, 32, 64) for resnet20 to resnet110, (64, 128, 256) for wide_resnet32, (64, 128, 256, 512) for resnet18.
    """
    need_size(name, image_shape)
    plan = RESNETS[name]
    return ResNet(image_shape[0], classes, plan.blocks, checked_widths(name, widths, plan.widths))


class InvertedResidual(nn.Module):
    """1x1 convolution to more channels, depthwise 3x3, 1x1 back to few, with a shortcut where the shape stays."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [nn.Conv2d(in_channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()]
        depthwise = nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False)
        layers += [depthwise, nn.BatchNorm2d(hidden), nn.ReLU6()]
        layers += [nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels)]
        self.layers = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, in_channels, h, w] to [n, channels, h / stride, w / stride]."""
        out = self.layers(x)
        return x + out if self.has_shortcut else out


def mobilenetv2(image_shape: tuple[int, int, int], classes: int, widths: Sequence[int] | None = None) -> nn.Module:
    """MobileNetV2 (Sandler et al. 2018) with strides for small images: 32x32 ends at 4x4.

    `widths` = (32, 16, 24, 32, 64, 96, 160, 320, 1280): the stem, the seven stages, the last 1x1 convolution; inside a
    block the channels are six times those of its input.
    """
    need_size("mobilenetv2", image_shape)
    stem, *stages, last = checked_widths("mobilenetv2", widths, MOBILENET_WIDTHS)
    layers: list[nn.Module] = [
        nn.Conv2d(image_shape[0], stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem), nn.ReLU6()
    ]  # fmt: skip
    features = stem
    for width, (expansion, blocks, stride) in zip(stages, MOBILENET_STAGES):
        for block in range(blocks):
            layers.append(InvertedResidual(features, width, stride if block == 0 else 1, expansion))
            features = width
    layers += [nn.Conv2d(features, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, classes))
