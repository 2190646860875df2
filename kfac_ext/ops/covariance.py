"""Covariances of layer inputs and output gradients: the Kronecker factors A and G."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kfac_ext import reference
from kfac_ext.geometry import ConvGeometry, Pair, accumulator_dtype, conv_geometry, is_int, padded_geometry
from kfac_ext.ops._covariance_kernels import (
    Problem,
    conv_problem,
    fits_cuda,
    gradient_problem,
    linear_problem,
    run_cpu,
    run_cuda,
)
from kfac_ext.ops._library import check_flag, check_floating, check_output, check_weights, define, native_device

_FAMILY = "covariance"

_MODES = ("expand", "reduce")


def _reduces(operation: str, mode: str) -> bool:
    if not isinstance(mode, str) or mode not in _MODES:
        raise ValueError(f"{operation}: mode is {mode!r}, expected 'expand' or 'reduce'")
    return mode == "reduce"


def _factor_shape(groups: int, n: int) -> tuple[int, ...]:
    return (groups, n, n) if groups > 1 else (n, n)


def _run_native(operation: str, problem_of: Callable[..., Problem], x: Tensor, *arguments: Any) -> bool:
    """Compute problem_of(x, *arguments) by a kernel; False, and nothing is done, if none serves x."""
    if not native_device(operation, x, _FAMILY):
        return False
    problem = problem_of(x, *arguments)
    if not (x.is_cpu or fits_cuda(problem)):
        return False
    _run(problem)
    return True


def _run(problem: Problem) -> None:
    if problem.image.is_cpu:
        run_cpu(problem)
    else:
        run_cuda([problem])


# ---- rows ----


def _check_linear(out: Tensor, x: Tensor, bias: bool) -> None:
    operation = "linear_covariance"
    check_floating(operation, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{operation}: x has 0 dimensions, expected at least 1: [..., d]")
    n = x.shape[-1] + int(bias)  # a symbolic size and a bool cannot be added in torch 2.6
    check_output(operation, out, (n, n), accumulator_dtype(x.dtype), x.device)


def _linear(out: Tensor, x: Tensor, bias: bool, decay: float, scale: float) -> None:
    _check_linear(out, x, bias)
    check_weights("linear_covariance", decay, scale)
    if not _run_native("linear_covariance", linear_problem, x, out, bias, decay, scale):
        reference.linear_covariance_(out, x, decay=decay, scale=scale, bias=bias)


def _linear_fake(out: Tensor, x: Tensor, bias: bool, decay: float, scale: float) -> None:
    _check_linear(out, x, bias)


_linear_op = define(
    "linear_covariance_(Tensor(a!) out, Tensor x, bool bias, float decay, float scale) -> ()", _linear, _linear_fake
)


def linear_covariance_(out: Tensor, x: Tensor, *, decay: float = 0.0, scale: float = 1.0, bias: bool = False) -> Tensor:
    """out <- decay out + scale linear_covariance(x, bias=bias), in one pass; returns `out`.

    Args:
        out: [d(+1), d(+1)], contiguous, float32 (float64 for float64 x); mutated; no part of `x`.
        x: [..., d], as for `linear_covariance`.
        decay: weight of what `out` holds; 0 overwrites it, NaN included.
        scale: weight of the new value. A running average has decay 0.95 and scale 0.05.
        bias: append 1 to every row.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is wanted; `out` is unchanged then.
        RuntimeError: `out` requires grad while gradients are on.
        MemoryError, KeyboardInterrupt: `out` is unchanged then if decay is not 0, else of no use.

    Example:
        >>> A = torch.zeros(5, 5)
        >>> _ = kfac_ext.linear_covariance_(A, torch.randn(32, 4), decay=0.95, scale=0.05, bias=True)
    """
    check_floating("linear_covariance", "x", x)
    check_flag("linear_covariance", "bias", bias)
    _linear_op(out, x.detach(), bias, decay, scale)
    return out


def linear_covariance(x: Tensor, *, bias: bool = False) -> Tensor:
    """Covariance of the inputs of a linear layer: A = 1/R sum_r a_r a_r^T over all R rows a of x.

    The factor A of Martens & Grosse 2015 (equation 1); with a sequence [N, T, d] the 'expand' setting of
    Eschenhagen et al. 2023.

    Args:
        x: [..., d], float32, float64, bfloat16 or float16, any strides.
        bias: append 1 to every row, as the last entry.

    Returns:
        [d, d], or [d+1, d+1] with bias; float32, float64 for float64 x. Not differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is wanted.

    Example:
        >>> kfac_ext.linear_covariance(torch.randn(32, 10, 4), bias=True).shape
        torch.Size([5, 5])
    """
    check_floating("linear_covariance", "x", x)
    check_flag("linear_covariance", "bias", bias)
    n = (x.shape[-1] if x.dim() else 0) + int(bias)
    return linear_covariance_(x.new_empty(n, n, dtype=accumulator_dtype(x.dtype)), x, bias=bias)


# ---- images ----


def _check_conv(out: Tensor, x: Tensor, geometry: ConvGeometry, bias: bool) -> None:
    operation = "conv2d_covariance"
    check_floating(operation, "x", x)
    shape = _factor_shape(geometry.groups, geometry.patch_size(x.shape[1]) + int(bias))
    check_output(operation, out, shape, accumulator_dtype(x.dtype), x.device)


def _geometry(
    x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair | str, dilation: Pair, groups: int
) -> ConvGeometry:
    check_floating("conv2d_covariance", "x", x)
    try:
        return conv_geometry(x.shape, kernel_size, stride, padding, dilation, groups)
    except ValueError as error:
        raise ValueError(f"conv2d_covariance: {error}") from None


def _conv(
    out: Tensor,
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    bias: bool,
    reduce: bool,
    decay: float,
    scale: float,
) -> None:
    check_floating("conv2d_covariance", "x", x)
    geometry = padded_geometry(x.shape, kernel_size, stride, padding, dilation, groups)
    _check_conv(out, x, geometry, bias)
    check_weights("conv2d_covariance", decay, scale)
    if _run_native("conv2d_covariance", conv_problem, x, out, geometry, bias, reduce, decay, scale):
        return
    image = torch.nn.functional.pad(x, padding)
    options: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups, "bias": bias}
    options["mode"] = _MODES[reduce]
    reference.conv2d_covariance_(out, image, kernel_size, decay=decay, scale=scale, **options)


def _conv_fake(
    out: Tensor,
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    bias: bool,
    reduce: bool,
    decay: float,
    scale: float,
) -> None:
    _check_conv(out, x, padded_geometry(x.shape, kernel_size, stride, padding, dilation, groups), bias)


_conv_op = define(
    "conv2d_covariance_(Tensor(a!) out, Tensor x, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
    "int groups, bool bias, bool reduce, float decay, float scale) -> ()",
    _conv,
    _conv_fake,
)


def conv2d_covariance_(
    out: Tensor,
    x: Tensor,
    kernel_size: Pair,
    *,
    decay: float = 0.0,
    scale: float = 1.0,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    bias: bool = False,
    mode: str = "expand",
) -> Tensor:
    """out <- decay out + scale conv2d_covariance(x, kernel_size, ...), in one pass; returns `out`.

    Args:
        out: [d, d] or [groups, d, d], contiguous, float32 (float64 for float64 x); mutated; no part of `x`.
        x, kernel_size, stride, padding, dilation, groups, bias, mode: as for `conv2d_covariance`.
        decay: weight of what `out` holds; 0 overwrites it, NaN included.
        scale: weight of the new value.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is wanted; `out` is unchanged then.
        RuntimeError: `out` requires grad while gradients are on.
        MemoryError, KeyboardInterrupt: `out` is unchanged then if decay is not 0, else of no use.

    Example:
        >>> A = torch.zeros(27, 27)
        >>> _ = kfac_ext.conv2d_covariance_(A, torch.randn(8, 3, 32, 32), 3, decay=0.95, scale=0.05, padding=1)
    """
    geometry = _geometry(x, kernel_size, stride, padding, dilation, groups)
    check_flag("conv2d_covariance", "bias", bias)
    _conv_op(
        out,
        x.detach(),
        geometry.kernel_size,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        groups,
        bias,
        _reduces("conv2d_covariance", mode),
        decay,
        scale,
    )
    return out


def conv2d_covariance(
    x: Tensor,
    kernel_size: Pair,
    *,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    bias: bool = False,
    mode: str = "expand",
) -> Tensor:
    """Covariance of the patches a 2-D convolution sees: A = 1/(N S) sum over samples and positions of a a^T.

    a lists one patch in the order (channel, kernel row, kernel column), then 1 if `bias`: the order of
    `weight.flatten(1)`. Grosse & Martens 2016; 'reduce' (Eschenhagen et al. 2023) averages the patches of a sample
    over its S positions first, A = 1/N sum of mean(a) mean(a)^T.

    No patch is ever written to memory: entry ((c, p), (c', q)) depends on q - p only, up to the borders, so a 3 x 3
    kernel needs 13 products of the image with its shifted self instead of 81.

    Args:
        x: [N, C, H, W], float32, float64, bfloat16 or float16, any strides.
        kernel_size, stride, padding, dilation, groups: as for `torch.nn.Conv2d` (padding 'same' and 'valid' too).
        bias: append 1 to every patch.
        mode: 'expand' or 'reduce'.

    Returns:
        [d, d], or [groups, d, d] for groups > 1; d = C/groups kh kw (+1). float32, float64 for float64 x.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is wanted.

    Example:
        >>> kfac_ext.conv2d_covariance(torch.randn(8, 16, 32, 32), 3, padding=1).shape
        torch.Size([144, 144])
    """
    geometry = _geometry(x, kernel_size, stride, padding, dilation, groups)
    check_flag("conv2d_covariance", "bias", bias)
    shape = _factor_shape(groups, geometry.patch_size(x.shape[1]) + int(bias))
    return conv2d_covariance_(
        x.new_empty(shape, dtype=accumulator_dtype(x.dtype)),
        x,
        kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=bias,
        mode=mode,
    )


# ---- gradients ----


def _check_gradient(out: Tensor, g: Tensor, groups: int) -> None:
    operation = "gradient_covariance"
    check_floating(operation, "g", g)
    n = _gradient_size(g, groups)
    check_output(operation, out, _factor_shape(groups, n), accumulator_dtype(g.dtype), g.device)


def _gradient_size(g: Tensor, groups: int) -> int:
    if g.dim() not in (2, 4):
        raise ValueError(
            f"gradient_covariance: g has {g.dim()} dimensions {tuple(g.shape)}, expected [N, O] or [N, O, H, W]"
        )
    if not is_int(groups) or groups < 1 or g.shape[1] % groups:
        raise ValueError(f"gradient_covariance: groups is {groups!r}, expected a divisor of the {g.shape[1]} channels")
    return g.shape[1] // groups


def _gradient(out: Tensor, g: Tensor, groups: int, reduce: bool, decay: float, scale: float) -> None:
    _check_gradient(out, g, groups)
    check_weights("gradient_covariance", decay, scale)
    if not _run_native("gradient_covariance", gradient_problem, g, out, groups, reduce, decay, scale):
        reference.gradient_covariance_(out, g, decay=decay, scale=scale, groups=groups, mode=_MODES[reduce])


def _gradient_fake(out: Tensor, g: Tensor, groups: int, reduce: bool, decay: float, scale: float) -> None:
    _check_gradient(out, g, groups)


_gradient_op = define(
    "gradient_covariance_(Tensor(a!) out, Tensor g, int groups, bool reduce, float decay, float scale) -> ()",
    _gradient,
    _gradient_fake,
)


def gradient_covariance_(
    out: Tensor, g: Tensor, *, decay: float = 0.0, scale: float = 1.0, groups: int = 1, mode: str = "expand"
) -> Tensor:
    """out <- decay out + scale gradient_covariance(g, ...), in one pass; returns `out`.

    Args:
        out: [O, O] or [groups, O/groups, O/groups], contiguous, float32 (float64 for float64 g); mutated; no part of
            `g`.
        g, groups, mode: as for `gradient_covariance`.
        decay: weight of what `out` holds; 0 overwrites it, NaN included.
        scale: weight of the new value.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is wanted; `out` is unchanged then.
        RuntimeError: `out` requires grad while gradients are on.
        MemoryError, KeyboardInterrupt: `out` is unchanged then if decay is not 0, else of no use.

    Example:
        >>> G = torch.zeros(10, 10)
        >>> _ = kfac_ext.gradient_covariance_(G, torch.randn(32, 10), decay=0.95, scale=0.05)
    """
    check_floating("gradient_covariance", "g", g)
    _gradient_op(out, g.detach(), groups, _reduces("gradient_covariance", mode), decay, scale)
    return out


def gradient_covariance(g: Tensor, *, groups: int = 1, mode: str = "expand") -> Tensor:
    """Covariance of the gradients at a layer's outputs: G = 1/N sum over samples and positions of g g^T.

    g = d(loss summed over samples)/d(pre-activation), so that A (x) G estimates the layer's block of the Fisher
    matrix of the mean loss (Martens & Grosse 2015; Grosse & Martens 2016). 'reduce' sums g over positions first.

    Args:
        g: [N, O] or [N, O, H, W], float32, float64, bfloat16 or float16, any strides.
        groups: one block for each group of output channels.
        mode: 'expand' or 'reduce'.

    Returns:
        [O, O], or [groups, O/groups, O/groups] for groups > 1; float32, float64 for float64 g.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is wanted.

    Example:
        >>> kfac_ext.gradient_covariance(torch.randn(8, 16, 32, 32), mode="reduce").shape
        torch.Size([16, 16])
    """
    check_floating("gradient_covariance", "g", g)
    shape = _factor_shape(groups, _gradient_size(g, groups))
    out = g.new_empty(shape, dtype=accumulator_dtype(g.dtype))
    return gradient_covariance_(out, g, groups=groups, mode=mode)
