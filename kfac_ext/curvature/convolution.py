"""Every convolution as a two-dimensional one: what its patches and its matrix are.

A one-dimensional convolution is one over images of height 1. A transposed convolution is the convolution of its input
with stride - 1 zeros between the pixels, by the filters turned round (Dumoulin & Visin 2016, arXiv 1603.07285); so its
patches, its A and its G are those of that convolution. A layer's *matrix* is [O, d], d = in_channels/groups kh kw in
the order (c, kh, kw) of these patches.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from kfac_ext.geometry import conv_geometry

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
Convolution: TypeAlias = "nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d | nn.ConvTranspose2d"


def weight_matrix(module: nn.Module, tensor: Tensor | None = None) -> Tensor:
    """The weight of a Linear or convolution, or a tensor of its shape, as its matrix [O, d].

    Example:
        >>> weight_matrix(nn.ConvTranspose2d(6, 4, 3, groups=2)).shape
        torch.Size([4, 27])
    """
    weight = module.weight if tensor is None else tensor
    assert isinstance(weight, Tensor)
    if not isinstance(module, TRANSPOSED):
        return weight.flatten(1)
    # [in, out/groups, kernel] -> [out, in/groups, kernel turned round]
    swapped = weight.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1)
    return swapped.flip(tuple(range(2, weight.dim()))).flatten(1)


def weight_like(module: nn.Module, matrix: Tensor) -> Tensor:
    """The inverse of `weight_matrix`: a matrix [O, d] in the shape of the module's weight."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if not isinstance(module, TRANSPOSED):
        return matrix.reshape(weight.shape)
    kernel = weight.shape[2:]
    turned = matrix.reshape(len(matrix), -1, *kernel).flip(tuple(range(2, weight.dim())))
    return turned.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1)


def as_image(x: Tensor) -> Tensor:
    """A sequence [N, C, L] as images [N, C, 1, L]; images as they are."""
    return x[:, :, None] if x.dim() == 3 else x


def padded_input(module: Convolution, x: Tensor) -> tuple[Tensor, Any]:
    """(images, padding) such that zero padding of them by `padding` gives what the convolution sees of x.

    Whatever its padding_mode; a transposed convolution sees zeros between the pixels.
    """
    image = as_image(x)
    if isinstance(module, TRANSPOSED):
        return _spread(module, image), 0
    padding = module.padding if isinstance(module.padding, str) else pair(module.padding, 0)
    if module.padding_mode == "zeros":
        return image, padding
    geometry = conv_geometry(image.shape, padding=padding, **geometry_options(module))
    return F.pad(image, geometry.padding, mode=module.padding_mode), 0


def _spread(module: Convolution, image: Tensor) -> Tensor:
    """`image` with stride - 1 zeros between its pixels and the border a convolution without padding needs."""
    stride, dilation, kernel = pair(module.stride, 1), pair(module.dilation, 1), pair(module.kernel_size, 1)
    assert not isinstance(module.padding, str)
    lost, added = pair(module.padding, 0), pair(module.output_padding, 0)
    sizes = [(size - 1) * step + 1 for size, step in zip(image.shape[2:], stride)]
    spread = image.new_zeros(*image.shape[:2], *sizes)
    spread[:, :, :: stride[0], :: stride[1]] = image
    (top, bottom), (left, right) = (
        ((k - 1) * d - p, (k - 1) * d - p + a) for k, d, p, a in zip(kernel, dilation, lost, added)
    )
    return F.pad(spread, (left, right, top, bottom))


def geometry_options(module: Convolution) -> dict[str, Any]:
    """Arguments of `torch.nn.functional.conv2d` on `padded_input`, but for the padding: kernel_size, stride, ..."""
    stride = 1 if isinstance(module, TRANSPOSED) else module.stride
    return {
        "kernel_size": pair(module.kernel_size, 1),
        "stride": pair(stride, 1),
        "dilation": pair(module.dilation, 1),
        "groups": module.groups,
    }


def pair(value: int | tuple[int, ...], height: int) -> tuple[int, int]:
    """(vertical, horizontal) of a one- or two-dimensional argument; `height` is the vertical one of a sequence."""
    if isinstance(value, int):
        return value, value
    return (height, value[0]) if len(value) == 1 else (value[0], value[1])
