"""Networks without branches: a perceptron, LeNet-5, small and VGG stacks of convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from flatprune.models.shapes import checked_widths, need_size

MLP_WIDTHS = (128, 64)
CONVNET_WIDTHS = (16, 16, 32, 32, 64, 64)
VGG_WIDTHS: dict[str, tuple[int | str, ...]] = {
    "vgg11_bn": (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    "vgg13_bn": (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    "vgg16_bn": (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"),
    "vgg19_bn": (64, 64, "M", 128, 128, "M", *(256,) * 4, "M", *(512,) * 4, "M", *(512,) * 4, "M"),
}


def mlp(image_shape: tuple[int, int, int], classes: int, widths: Sequence[int] | None = None) -> nn.Module:
    """A perceptron with ReLU and hidden layers of `widths` (default 128, 64) on the flattened image."""
    layers: list[nn.Module] = [nn.Flatten()]
    features = math.prod(image_shape)
    for width in MLP_WIDTHS if widths is None else widths:
        layers += [nn.Linear(features, width), nn.ReLU()]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, classes))


def lenet5(image_shape: tuple[int, int, int], classes: int, widths: Sequence[int] | None = None) -> nn.Module:
    """LeNet-5 with ReLU and max pooling (LeCun et al. 1998); `widths` = (6, 16, 120, 84).

    Images below 16x16 are padded before the second convolution too.
    """
    channels, height, width = image_shape
    need_size("lenet5", image_shape)
    first, second, third, fourth = checked_widths("lenet5", widths, (6, 16, 120, 84))
    padding = 2 if min(height, width) < 16 else 0
    area = math.prod((side // 2 + 2 * padding - 4) // 2 for side in (height, width))
    return nn.Sequential(
        nn.Conv2d(channels, first, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, 5, padding=padding),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(second * area, third),
        nn.ReLU(),
        nn.Linear(third, fourth),
        nn.ReLU(),
        nn.Linear(fourth, classes),
    )


def convnet(image_shape: tuple[int, int, int], classes: int, widths: Sequence[int] | None = None) -> nn.Module:
    """Six 3x3 convolutions with batch norm, pooled after the second and fourth, global average; 16-16-32-32-64-64."""
    need_size("convnet", image_shape)
    a, b, c, d, e, f = checked_widths("convnet", widths, CONVNET_WIDTHS)
    return _conv_stack(image_shape, classes, (a, b, "M", c, d, "M", e, f))


def vgg(
    image_shape: tuple[int, int, int], classes: int, widths: Sequence[int] | None = None, *, name: str
) -> nn.Module:
    """VGG with batch norm for small images (Simonyan & Zisserman 2015): poolings stop at 1x1, one linear layer ends it.

    `widths` replaces the channels of the convolutions in their order.
    """
    need_size(name, image_shape)
    plan = VGG_WIDTHS[name]
    given = iter(checked_widths(name, widths, tuple(item for item in plan if isinstance(item, int))))
    return _conv_stack(image_shape, classes, [item if item == "M" else next(given) for item in plan])


def _conv_stack(image_shape: tuple[int, int, int], classes: int, plan: Sequence[int | str]) -> nn.Module:
    features, *size = image_shape
    layers: list[nn.Module] = []
    for item in plan:
        if isinstance(item, int):
            layers += [nn.Conv2d(features, item, 3, padding=1, bias=False), nn.BatchNorm2d(item), nn.ReLU()]
            features = item
        elif min(size) >= 2:
            layers.append(nn.MaxPool2d(2))
            size = [side // 2 for side in size]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, classes))
