"""Small versions of every network that ships, with norms that are not the identity."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from flatprune import models

SHAPE = (2, 8, 8)
CLASSES = 7
WIDTHS = {
    "mlp": (24, 16),
    "lenet5": (4, 6, 20, 12),
    "convnet": (4, 4, 8, 8, 12, 12),
    "vgg11_bn": (6,) * 8,
    "vgg13_bn": (6,) * 10,
    "vgg16_bn": (6,) * 13,
    "vgg19_bn": (6,) * 16,
    **{f"resnet{depth}": (6, 6, 8) for depth in (20, 32, 44, 56, 110)},
    "wide_resnet32": (6, 8, 8),
    "resnet18": (6, 6, 8, 8),
    "mobilenetv2": (4, 4, 4, 4, 6, 6, 6, 8, 16),
    "densenet40": (6, 3, 4, 3),
    "vit_tiny": (48, 40),
}


@functools.cache
def image_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(16, *SHAPE, generator=generator), torch.randint(0, CLASSES, (16,), generator=generator)


def arguments(name: str) -> dict[str, object]:
    return {"name": name, "image_shape": SHAPE, "classes": CLASSES, "widths": WIDTHS[name]}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = models.build(name, SHAPE, CLASSES, WIDTHS[name])
    for module in model.modules():  # norms that are not the identity, signals that last through many layers
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    with torch.no_grad():
        model(image_batch()[0])
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.momentum = 0.1
    return model.eval()
