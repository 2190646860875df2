"""Networks for small images, each adapting to the size and the channels of the images it gets.

Every network is rebuilt from a name and plain arguments (`build`), which is what `model.pt` stores beside the tensors.
Convolutions that batch norm follows have no bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from flatprune import named
from flatprune.errors import InputError, did_you_mean
from flatprune.models.dense import densenet40
from flatprune.models.measures import (
    LAYERS,
    has_batch_norm,
    layer_widths,
    module_macs,
    multiply_accumulates,
    parameter_count,
)
from flatprune.models.own import build_own
from flatprune.models.plain import VGG_WIDTHS, convnet, lenet5, mlp, vgg
from flatprune.models.residual import RESNETS, ResNet, mobilenetv2, resnet
from flatprune.models.vit import vit_tiny

__all__ = [
    "LAYERS",
    "MODELS",
    "ResNet",
    "build",
    "check_name",
    "has_batch_norm",
    "layer_widths",
    "module_macs",
    "multiply_accumulates",
    "names",
    "parameter_count",
]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "lenet5": lenet5,
    "convnet": convnet,
    **{name: partial(vgg, name=name) for name in VGG_WIDTHS},
    **{name: partial(resnet, name=name) for name in RESNETS},
    "mobilenetv2": mobilenetv2,
    "densenet40": densenet40,
    "vit_tiny": vit_tiny,
}


def names() -> list[str]:
    """All names that `build` takes."""
    return list(MODELS)


def check_name(name: str) -> None:
    """Raise InputError, with near names, for a model that is neither known nor a function of the user's own."""
    if name not in names() and not named.is_named(name):
        raise InputError(f"unknown model {name!r}; {did_you_mean(name, names(), at_most=3)}")


def build(name: str, image_shape: tuple[int, int, int], classes: int, widths: Sequence[int] | None = None) -> nn.Module:
    """A freshly initialised network; its random numbers are torch's global ones.

    Args:
        name: one of `names()`, or "module:function" of the user's own (see `flatprune.models.own`).
        image_shape: (channels, height, width).
        classes: number of outputs.
        widths: hidden widths, as documented at each network; default its usual ones.

    Raises:
        InputError: the name is unknown, the images are too small, or there are too few or too many widths.
    """
    check_name(name)
    if named.is_named(name):
        return build_own(name, image_shape, classes, widths)
    if widths is not None and any(width < 1 for width in widths):
        raise InputError(f"widths of {name} are {tuple(widths)}, expected 1 or more each")
    return MODELS[name](image_shape, classes, widths)
