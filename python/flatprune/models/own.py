"""A network of the user's own class, made by a function that the user names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flatprune import named
from flatprune.errors import InputError
from kfac_ext.curvature.modes import module_modes


def build_own(
    name: str, image_shape: tuple[int, int, int], classes: int, widths: Sequence[int] | None = None
) -> nn.Module:
    """What the function gives, once it is known to take the images.

    Args:
        name: "module:function"; called with those of `image_shape`, `classes` and (where they are given) `widths` that
            it takes.
        image_shape: (channels, height, width).
        classes: outputs that the network is to have.
        widths: hidden widths.

    Raises:
        InputError: the user has not named it, or it gives no network from such images to logits [n, classes, ...].
    """
    offered = {"image_shape": image_shape, "classes": classes}
    if widths is not None:
        if not named.takes("model", name, "widths"):
            raise InputError(f"widths is {tuple(widths)}, but model {name} takes no widths")
        offered["widths"] = tuple(widths)
    model = named.call("model", name, **offered)
    if not isinstance(model, nn.Module):
        raise InputError(f"model {name}: gives {type(model).__name__}, expected a torch.nn.Module")
    found = _output(name, model, torch.zeros(2, *image_shape))
    if not isinstance(found, Tensor) or found.shape[:2] != (2, classes):
        given = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"model {name}: gives {given} for 2 images, expected logits (2, {classes})")
    return model


@torch.no_grad()
def _output(name: str, model: nn.Module, images: Tensor) -> object:
    with module_modes(dict.fromkeys(model.modules(), False)):
        try:
            return model(images)
        except Exception as error:
            shape = "x".join(map(str, images.shape[1:]))
            raise InputError(f"model {name}: raises {type(error).__name__} for images {shape}: {error}") from error
