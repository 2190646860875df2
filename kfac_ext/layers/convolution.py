"""Convolutions over one, two and three dimensions, grouped, transposed or not: what their patches and matrices are.

The kernels know two dimensions. A one-dimensional convolution is one over images of height 1. One over volumes is one
over images: each output depth sees kd slices of the volume, which become channels in the order (c, kd), so that patches
are in the order (c, kd, kh, kw) of the weight. A transposed convolution is the convolution of its input with stride - 1
zeros between the pixels, by the filters turned round (Dumoulin & Visin 2016, arXiv 1603.07285); so its patches, its A
and its G are those of that convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_ext.geometry import accumulator_dtype, conv_geometry, remembered
from kfac_ext.layers.layer import Layer, register
from kfac_ext.ops.covariance_group import CovarianceUpdate

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

_FUNCTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_SHAPES = {1: "[N, C, L]", 2: "[N, C, H, W]", 3: "[N, C, D, H, W]"}


class Geometry(NamedTuple):
    """The arguments of a convolution, one number a dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    padding_mode: str = "zeros"

    @classmethod
    def of(cls, dims: int, arguments: Mapping[str, Any]) -> Geometry:
        """From arguments as `torch.nn.functional` takes them; what is missing has torch's default."""
        given = [arguments.get(name, default) for name, default in _DEFAULTS.items()]
        stride, padding, dilation, output_padding, mode = (tuple(v) if isinstance(v, list) else v for v in given)
        return _geometry(dims, stride, padding, dilation, output_padding, mode)


_DEFAULTS: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0, "padding_mode": "zeros"}


@remembered
def _geometry(dims: int, stride: Any, padding: Any, dilation: Any, output_padding: Any, mode: Any) -> Geometry:
    def numbers(value: Any) -> tuple[int, ...]:
        values = (value,) if isinstance(value, int) else tuple(int(v) for v in value)
        return values * dims if len(values) == 1 else values

    pads = padding if isinstance(padding, str) else numbers(padding)
    return Geometry(numbers(stride), pads, numbers(dilation), numbers(output_padding), mode)


@register(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class Convolution(Layer):
    """z = W * x + b with a weight [O, C/groups, kernel], on x [N, C, positions].

    Geometry and groups are those that the module has when they are asked for.
    """

    channel_dim = 1

    @property
    def geometry(self) -> Geometry:
        """From the arguments of the operator if that is what is seen, else from the attributes of the module."""
        if self.own_geometry is not None:
            return Geometry.of(self.dims, self.own_geometry)
        m = self.module
        return _geometry(self.dims, m.stride, m.padding, m.dilation, m.output_padding, m.padding_mode)

    @property
    def groups(self) -> int:
        """The module's groups, or those of the operator that is seen."""
        if self.own_geometry is None or self.own_geometry["groups_attribute"]:  # which a cut may change
            groups = self.module.groups
            assert isinstance(groups, int)
            return groups
        return self.own_geometry["groups"]

    @property
    def dims(self) -> int:
        """Dimensions of its positions: 1, 2 or 3."""
        return self.weight.dim() - 2

    def checked_input(self, x: Tensor) -> Tensor:
        """x [N, C, positions]; ValueError without a dimension for samples."""
        if x.dim() != self.weight.dim():
            raise ValueError(
                f"Curvature: layer {self.name!r} got an input {tuple(x.shape)}, expected {_SHAPES[self.dims]}"
            )
        return x

    def input_update(self, x: Tensor, mode: str, *, bias: bool, decay: float, scale: float) -> CovarianceUpdate:
        """Patches of x, by the two-dimensional kernel."""
        options: dict[str, Any] = {"groups": self.groups, "bias": bias, "decay": decay, "scale": scale}
        if self.dims == 3 and mode == "reduce":  # the kernel would average over each output depth alone
            return CovarianceUpdate.conv2d(f"{self.name}.A", self.mean_rows(x)[:, :, None, None], 1, **options)
        image, place = self._image(x)
        return CovarianceUpdate.conv2d(f"{self.name}.A", image, **place, mode=mode, **options)

    def gradient_update(self, g: Tensor, mode: str, *, decay: float, scale: float) -> CovarianceUpdate:
        """g [N, O, positions], or [N, O] where they are summed."""
        image = g if g.dim() == 2 else self.gradient_rows(g).mT[:, :, None]
        return CovarianceUpdate.gradient(
            f"{self.name}.G", image, groups=self.groups, mode=mode, decay=decay, scale=scale * len(g)
        )

    def position_count(self, x: Tensor) -> int:
        """Pixels of an output."""
        return math.prod(self._output_size(x.shape[2:]))

    def mean_rows(self, x: Tensor) -> Tensor:
        """The mean patch [N, groups d], without a patch in memory."""
        image, padding = self._padded(x)
        rows = image.to(accumulator_dtype(x.dtype))
        for taps in self._taps(x, rows, padding):  # each turns the first dimension left into the kernel's last
            rows = torch.tensordot(rows, taps, dims=([2], [1]))
        return rows.flatten(1) / self.position_count(x)

    def input_rows(self, x: Tensor) -> Tensor:
        """[N, positions, groups d], every patch in memory."""
        image, place = self._image(x)
        found = conv_geometry(image.shape, groups=1, **place)
        patches = F.unfold(F.pad(image, found.padding), found.kernel_size, found.dilation, stride=found.stride)
        return patches.mT.reshape(len(x), -1, patches.shape[1])  # the depths of a volume are images, in its order

    def gradient_rows(self, g: Tensor) -> Tensor:
        """[N, positions, O]."""
        return g.flatten(2).mT

    def projected(self, x: Tensor, filters: Tensor) -> Tensor:
        """The convolution with one filter a group: [N, positions, groups]."""
        image, padding = self._padded(x)
        return self._filtered(image, padding, filters.to(image.dtype)).flatten(2).mT

    def projected_sum(self, x: Tensor, filters: Tensor) -> Tensor:
        """[N, groups]."""
        # linear in the image: one weight a pixel, the sum of what the filter's taps give it
        image, padding = self._padded(x)
        probe = filters.new_zeros(1, *image.shape[1:], requires_grad=True)
        with torch.enable_grad():
            (weights,) = torch.autograd.grad(self._filtered(probe, padding, filters).sum(), probe)
        apart = image.to(weights.dtype).unflatten(1, (self.groups, -1))
        return torch.einsum("ngcp,gcp->ng", apart.flatten(3), weights[0].unflatten(0, (self.groups, -1)).flatten(2))

    def _filtered(self, image: Tensor, padding: tuple[int, ...] | str, filters: Tensor) -> Tensor:
        kernel = filters.reshape(self.groups, -1, *self.weight.shape[2:])
        options = {"padding": padding, "dilation": self.geometry.dilation, "groups": self.groups}
        return _FUNCTIONS[self.dims](image, kernel, stride=self._stride(), **options)

    # inside: a convolution of `_padded(x)` by `_stride()`

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, ...] | str]:
        """(x, padding) such that zero padding of it by `padding` gives what the convolution sees."""
        place = self.geometry
        if place.padding_mode == "zeros":
            return x, place.padding
        pads = [amount for pair in reversed(self._pads_left(self.geometry.padding)) for amount in pair]
        return F.pad(x, pads, mode=place.padding_mode), (0,) * self.dims

    def _stride(self) -> tuple[int, ...]:
        return self.geometry.stride

    def _reach(self) -> list[int]:
        """How many pixels lie between the first and the last tap."""
        return [(k - 1) * d for k, d in zip(self.weight.shape[2:], self.geometry.dilation)]

    def _pads_left(self, padding: tuple[int, ...] | str) -> list[tuple[int, int]]:
        """Padding as (before, after) of each dimension."""
        if padding == "valid":
            return [(0, 0)] * self.dims
        if isinstance(padding, str):  # same: torch puts the odd pixel at the end
            return [(reach // 2, reach - reach // 2) for reach in self._reach()]
        return [(p, p) for p in padding]

    def _output_size(self, sizes: Sequence[int]) -> list[int]:
        places = zip(sizes, self._pads_left(self.geometry.padding), self._reach(), self.geometry.stride)
        return [(size + sum(pads) - reach - 1) // step + 1 for size, pads, reach, step in places]

    def _taps(self, x: Tensor, image: Tensor, padding: tuple[int, ...] | str) -> list[Tensor]:
        """[k, size] of each dimension: 1 where a pixel of `image`, from `_padded(x)`, is under that tap somewhere."""
        before = [pads[0] for pads in self._pads_left(padding)]
        sizes = zip(image.shape[2:], self.weight.shape[2:], self._output_size(x.shape[2:]))
        steps = zip(before, self._stride(), self.geometry.dilation)
        return [_tap_matrix(*numbers, *step, image) for numbers, step in zip(sizes, steps)]

    def _image(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """(images, arguments) of the two-dimensional convolution with the same patches."""
        image, padding = self._padded(x)
        kernel, stride, dilation = tuple(self.weight.shape[2:]), self._stride(), self.geometry.dilation
        if self.dims == 3:
            before, after = self._pads_left(padding)[0]
            image = _slices_as_channels(F.pad(image, (0, 0, 0, 0, before, after)), kernel[0], stride[0], dilation[0])
            kernel, stride, dilation = kernel[1:], stride[1:], dilation[1:]
            padding = padding if isinstance(padding, str) else padding[1:]
        if self.dims == 1:
            image, kernel, stride, dilation = image[:, :, None], (1, *kernel), (1, *stride), (1, *dilation)
            padding = padding if isinstance(padding, str) else (0, *padding)
        return image, {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation}


@register(*TRANSPOSED)
class TransposedConvolution(Convolution):
    """A convolution turned round, with a weight [C, O/groups, kernel]."""

    output_dim, input_dim = 1, 0

    def input_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The first argument; output_size is refused."""
        if len(args) > 1 or kwargs.get("output_size") is not None:
            raise ValueError(
                f"Curvature: layer {self.name!r} is called with output_size, which changes its geometry from call "
                "to call; set output_padding instead, or leave it out by skip_layers"
            )
        return super().input_of(args, kwargs)

    def weight_matrix(self, tensor: Tensor | None = None) -> Tensor:
        """[O, d] of the convolution that it is: input channels of a group, kernel turned round."""
        weight = self.weight if tensor is None else tensor
        # [in, out/groups, kernel] -> [out, in/groups, kernel turned round]
        swapped = weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        return swapped.flip(tuple(range(2, weight.dim()))).flatten(1)

    def weight_like(self, matrix: Tensor) -> Tensor:
        """The inverse of `weight_matrix`."""
        kernel = self.weight.shape[2:]
        turned = matrix.reshape(len(matrix), -1, *kernel).flip(tuple(range(2, 2 + len(kernel))))
        return turned.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, ...] | str]:
        """`x` with stride - 1 zeros between its pixels and the border a convolution without padding needs."""
        place, steps = self.geometry, self.geometry.stride
        assert not isinstance(place.padding, str)
        sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], steps)]
        spread = x.new_zeros(*x.shape[:2], *sizes)
        pixels = spread
        for dim, step in enumerate(steps, 2):
            pixels = pixels[(slice(None),) * dim + (slice(None, None, step),)]
        pixels.copy_(x)
        borders = zip(self._reach(), place.padding, place.output_padding)
        pads = [(reach - lost, reach - lost + added) for reach, lost, added in borders]
        return F.pad(spread, [amount for pair in reversed(pads) for amount in pair]), "valid"

    def _stride(self) -> tuple[int, ...]:
        return (1,) * self.dims

    def _output_size(self, sizes: Sequence[int]) -> list[int]:
        place = self.geometry
        assert not isinstance(place.padding, str)
        parts = zip(sizes, place.stride, place.padding, self._reach(), place.output_padding)
        return [(size - 1) * step - 2 * lost + reach + added + 1 for size, step, lost, reach, added in parts]


def _slices_as_channels(x: Tensor, kernel: int, stride: int, dilation: int) -> Tensor:
    """Volumes [N, C, D, H, W] as images [N D', C k, H, W], D' the positions of a kernel that walks along D."""
    windows = x.unfold(2, (kernel - 1) * dilation + 1, stride)[..., ::dilation]  # [N, C, D', H, W, k]
    return windows.permute(0, 2, 1, 5, 3, 4).flatten(2, 3).flatten(0, 1)


def _tap_matrix(size: int, kernel: int, outputs: int, before: int, stride: int, dilation: int, like: Tensor) -> Tensor:
    pixel = torch.arange(size, device=like.device)
    tap = torch.arange(kernel, device=like.device)
    distance = pixel + before - dilation * tap[:, None]  # from the first position's tap
    return ((distance >= 0) & (distance < stride * outputs) & (distance % stride == 0)).to(like.dtype)
