"""Networks for small images, each adapting to the size and the channels of the images it gets.

Every network is rebuilt from a name and plain arguments (`build`), which is what `model.pt` stores beside the tensors.
Convolutions that batch norm follows have no bias. Shortcuts of residual networks are 1x1 convolutions, since a
shortcut that pads with zeros fixes the order of the channels and so cannot be pruned.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from flatprune.errors import InputError

MIN_IMAGE_SIZE = 8  # of the convolutional networks; the perceptron takes any
MLP_WIDTHS = (128, 64)
CONVNET_WIDTHS = (16, 16, 32, 32, 64, 64)
VGG_WIDTHS: dict[str, tuple[int | str, ...]] = {
    "vgg11_bn": (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    "vgg13_bn": (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    "vgg16_bn": (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"),
    "vgg19_bn": (64, 64, "M", 128, 128, "M", *(256,) * 4, "M", *(512,) * 4, "M", *(512,) * 4, "M"),
}
RESNET_BLOCKS = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9, "resnet110": 18}


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
    _need_size("lenet5", image_shape)
    first, second, third, fourth = _widths("lenet5", widths, (6, 16, 120, 84))
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
    _need_size("convnet", image_shape)
    a, b, c, d, e, f = _widths("convnet", widths, CONVNET_WIDTHS)
    return _conv_stack(image_shape, classes, (a, b, "M", c, d, "M", e, f))


def vgg(
    image_shape: tuple[int, int, int], classes: int, widths: Sequence[int] | None = None, *, name: str
) -> nn.Module:
    """VGG with batch norm for small images (Simonyan & Zisserman 2015): poolings stop at 1x1, one linear layer ends it.

    `widths` replaces the channels of the convolutions in their order.
    """
    _need_size(name, image_shape)
    plan = VGG_WIDTHS[name]
    given = iter(_widths(name, widths, tuple(item for item in plan if isinstance(item, int))))
    return _conv_stack(image_shape, classes, [item if item == "M" else next(given) for item in plan])


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
    """Residual network for small images: a 3x3 stem, three stages at full, half and quarter size, global average."""

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
    """Residual network of He et al. 2016 for CIFAR; `widths` = (16, 32, 64), the channels of the three stages."""
    _need_size(name, image_shape)
    return ResNet(image_shape[0], classes, RESNET_BLOCKS[name], _widths(name, widths, (16, 32, 64)))


MODELS: dict[str, Callable[..., nn.Module]] = {"mlp": mlp, "lenet5": lenet5, "convnet": convnet}


def names() -> list[str]:
    """All names that `build` takes."""
    return [*MODELS, *VGG_WIDTHS, *RESNET_BLOCKS]


def check_name(name: str) -> None:
    """Raise InputError, with near names, for a model that is not known."""
    if name not in names():
        near = difflib.get_close_matches(name.lower(), names(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(names())}"
        raise InputError(f"unknown model {name!r}; {hint}")


def build(name: str, image_shape: tuple[int, int, int], classes: int, widths: Sequence[int] | None = None) -> nn.Module:
    """A freshly initialised network; its random numbers are torch's global ones.

    Args:
        name: one of `names()`.
        image_shape: (channels, height, width).
        classes: number of outputs.
        widths: hidden widths, as documented at each network; default its usual ones.

    Raises:
        InputError: the name is unknown, the images are too small, or there are too few or too many widths.
    """
    check_name(name)
    if widths is not None and any(width < 1 for width in widths):
        raise InputError(f"widths of {name} are {tuple(widths)}, expected 1 or more each")
    if name in VGG_WIDTHS:
        return vgg(image_shape, classes, widths, name=name)
    if name in RESNET_BLOCKS:
        return resnet(image_shape, classes, widths, name=name)
    return MODELS[name](image_shape, classes, widths)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any layer of the model is a batch norm."""
    return any(isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) for module in model.modules())


def layer_widths(model: nn.Module) -> dict[str, int]:
    """Name -> output channels or features of every linear and convolution layer."""
    return {
        name: module.weight.shape[0]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }


def parameter_count(model: nn.Module) -> int:
    """Number of trainable scalars (batch norm's running statistics are not among them)."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def multiply_accumulates(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Multiply-accumulate operations of the linear and convolution layers for one image (twice that many FLOPs).

    Counted by forward hooks: weight elements times the output positions, so a grouped convolution counts what it does.
    """
    total = 0

    def count(module: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal total
        weight = cast(Tensor, module.weight)
        total += weight.numel() * (output.numel() // len(weight))

    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    handles = [layer.register_forward_hook(count) for layer in layers]
    training = model.training
    try:
        model.eval()
        parameter = next(model.parameters())
        model(torch.zeros(1, *image_shape, device=parameter.device, dtype=parameter.dtype))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return total


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


def _need_size(name: str, image_shape: tuple[int, int, int]) -> None:
    _, height, width = image_shape
    if min(height, width) < MIN_IMAGE_SIZE:
        least = f"{MIN_IMAGE_SIZE}x{MIN_IMAGE_SIZE}"
        raise InputError(f"model {name} takes images of at least {least}, got {height}x{width}")


def _widths(name: str, widths: Sequence[int] | None, default: tuple[int, ...]) -> tuple[int, ...]:
    if widths is None:
        return default
    if len(widths) != len(default):
        raise InputError(f"widths of {name}: got {len(widths)} numbers, expected {len(default)} (as {default})")
    return tuple(widths)
