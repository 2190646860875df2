"""Covariance kernels, called on problems that are already checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kfac_ext import _C, reference
from kfac_ext.geometry import ConvGeometry
from kfac_ext.ops._cuda import register_family
from kfac_ext.ops._launch import descriptors_on, stream_of, tf32_allowed, workspace_on
from kfac_ext.ops._library import DTYPE_CODES

_AUTO = 0  # kfac::CovarianceAlgorithm::kAuto

_WORKSPACE_BYTES = 1 << 30  # a group that would need more is cut in two

# kernel 1 x 1, stride 1, no padding, dilation 1
_POINT = (1, 1, 1, 1, 0, 0, 1, 1)


class Problem(NamedTuple):
    """out <- decay out + scale sum over samples and positions of a a^T, for images seen by one convolution."""

    image: Tensor
    """[N, C, H, W]"""
    shape: tuple[int, ...]
    """N, C, H, W, kernel, stride, padding (top, left), dilation, output size, groups"""
    reduce: bool
    """average the patches of a sample first"""
    bias: bool
    decay: float
    scale: float
    out: Tensor


def conv_shape(x: Tensor, geometry: ConvGeometry) -> tuple[int, ...]:
    """The shape of a `Problem` whose image is x."""
    left, _, top, _ = geometry.padding
    place = (*geometry.kernel_size, *geometry.stride, top, left, *geometry.dilation)
    return (*x.shape, *place, *geometry.output_size, geometry.groups)


def rows_as_images(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The rows of x [..., d] as images of one pixel, and their shape as that of a `Problem`."""
    rows = x.reshape(-1, x.shape[-1], 1, 1)
    return rows, (*rows.shape, *_POINT, 1, 1, 1)


def linear_problem(x: Tensor, out: Tensor, bias: bool, decay: float, scale: float) -> Problem:
    """The rows of x [..., d]."""
    rows, shape = rows_as_images(x)
    return Problem(rows, shape, False, bias, decay, scale / rows.shape[0], out)


def conv_problem(
    x: Tensor, out: Tensor, geometry: ConvGeometry, bias: bool, reduce: bool, decay: float, scale: float
) -> Problem:
    """The patches of x."""
    positions = 1 if reduce else geometry.output_size[0] * geometry.output_size[1]
    return Problem(x, conv_shape(x, geometry), reduce, bias, decay, scale / (x.shape[0] * positions), out)


def gradient_problem(g: Tensor, out: Tensor, groups: int, reduce: bool, decay: float, scale: float) -> Problem:
    """The pixels of g as patches of a 1 x 1 convolution; `reduce` sums them where the kernels would average."""
    image = g[:, :, None, None] if g.dim() == 2 else g
    height, width = image.shape[2:]
    weight = (height * width) ** 2 if reduce else 1
    shape = (*image.shape, *_POINT, height, width, groups)
    return Problem(image, shape, reduce, False, decay, scale * weight / g.shape[0], out)


def run_cpu(problem: Problem) -> None:
    """Compute one problem on the CPU."""
    x = problem.image
    _C.covariance_cpu(
        x.data_ptr(),
        DTYPE_CODES[x.dtype],
        list(x.stride()),
        list(problem.shape),
        problem.reduce,
        _AUTO,
        problem.bias,
        problem.decay,
        problem.scale,
        problem.out.data_ptr(),
        torch.get_num_threads(),
    )


# ---- CUDA ----

_Spec = tuple[int, tuple[int, ...], tuple[int, ...], bool, int, bool, int]


class _Launch(NamedTuple):
    """Problems first up to end of a list, in one launch of each kernel."""

    first: int
    end: int
    group: _C.CovarianceGroup
    descriptors: Tensor


def _precision() -> int:
    """kfac::Precision: as exact as a float32 matmul, or tf32 where PyTorch may use it."""
    return int(tf32_allowed())


def _spec(problem: Problem, precision: int) -> _Spec:
    x = problem.image
    return DTYPE_CODES[x.dtype], x.stride(), problem.shape, problem.reduce, _AUTO, problem.bias, precision


@lru_cache(maxsize=64)
def _launches(device: torch.device, specs: tuple[_Spec, ...]) -> list[_Launch]:
    """The schedules of a list of problems, and their copies on the device; made once for each list of shapes."""
    return list(_cut(device, specs, 0, len(specs)))


def _cut(device: torch.device, specs: tuple[_Spec, ...], first: int, end: int) -> Iterator[_Launch]:
    group = _C.CovarianceGroup(specs[first:end]) if end - first <= _C.max_group_layers else None
    if group is None or (group.workspace_bytes > _WORKSPACE_BYTES and end - first > 1):
        middle = (first + end) // 2
        yield from _cut(device, specs, first, middle)
        yield from _cut(device, specs, middle, end)
    else:
        yield _Launch(first, end, group, descriptors_on(device, "covariance", group.descriptors()))


def run_cuda(problems: Sequence[Problem]) -> None:
    """Compute problems of one device, no two with the same out, in a few launches on its current stream."""
    device, precision = problems[0].image.device, _precision()
    for launch in _launches(device, tuple(_spec(problem, precision) for problem in problems)):
        part = problems[launch.first : launch.end]
        workspace = workspace_on(device, launch.group.workspace_bytes)
        _C.covariance_cuda(
            launch.group,
            launch.descriptors.data_ptr(),
            workspace.data_ptr(),
            [problem.image.data_ptr() for problem in part],
            [problem.out.data_ptr() for problem in part],
            [problem.decay for problem in part],
            [problem.scale for problem in part],
            device.index or 0,
            stream_of(device),
        )


_MAX_ROWS = 2**31 - 1  # rows are numbered in 32 bits


def fits_cuda(problem: Problem) -> bool:
    """Whether the CUDA kernels can number the rows of this problem."""
    return rows_fit(problem.shape)


def rows_fit(shape: tuple[int, ...]) -> bool:
    """Whether pixels and output positions of all samples can be numbered."""
    n, _, height, width, *_, out_h, out_w, _ = shape
    return n * max(height * width, out_h * out_w) <= _MAX_ROWS


def _check_error(device: torch.device) -> float:
    """Relative error of the CUDA kernels on a 3 x 3 convolution and on some rows, in one launch."""
    steps = torch.arange(3 * 20 * 7 * 6, dtype=torch.float64, device=device)
    x = torch.sin(steps * steps / 7).view(3, 20, 7, 6)
    rows = x.flatten()[: 45 * 50].view(45, 50)
    place = ConvGeometry((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), (7, 6), 1)
    exact = [reference.conv2d_covariance(x, 3, padding=1, bias=True), reference.linear_covariance(rows)]
    outs = [torch.full_like(value, torch.nan, dtype=torch.float32) for value in exact]
    run_cuda(
        [
            conv_problem(x.float(), outs[0], place, True, False, 0.0, 1.0),
            linear_problem(rows.float(), outs[1], False, 0.0, 1.0),
        ]
    )
    errors = torch.stack([(out - value).norm() / value.norm() for out, value in zip(outs, exact)])
    return float(errors.nan_to_num(nan=torch.inf).max())


# tf32 inputs, where they are allowed, are good for 2e-4 on so few rows
register_family("covariance", frozenset({torch.float32, torch.bfloat16, torch.float16}), _check_error, 1e-3)
