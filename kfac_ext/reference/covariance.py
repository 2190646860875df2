"""Kronecker factors by unfold and matmul."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_ext.geometry import Pair, accumulator_dtype, conv_geometry


def _with_one(rows: Tensor, bias: bool) -> Tensor:
    return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1) if bias else rows


def _blend_(out: Tensor, value: Tensor, decay: float, scale: float) -> Tensor:
    # decay 0 must forget whatever `out` holds, NaN included
    return out.mul_(decay).add_(value, alpha=scale) if decay else out.copy_(value.mul_(scale))


def linear_covariance(x: Tensor, *, bias: bool = False) -> Tensor:
    """A = 1/R sum_r a_r a_r^T over the R rows a of x [..., d]; see `kfac_ext.linear_covariance`."""
    rows = _with_one(x.reshape(-1, x.shape[-1]).to(accumulator_dtype(x.dtype)), bias)
    return rows.T @ rows / rows.shape[0]


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
    """A = 1/(N S) sum of a a^T over samples and patches of x [N, C, H, W]; see `kfac_ext.conv2d_covariance`."""
    geometry = conv_geometry(x.shape, kernel_size, stride, padding, dilation, groups)
    image = F.pad(x.to(accumulator_dtype(x.dtype)), geometry.padding)
    patches = F.unfold(image, geometry.kernel_size, geometry.dilation, 0, geometry.stride)  # [N, C kh kw, S]
    patches = patches.unflatten(1, (groups, -1)).permute(1, 0, 3, 2)  # [groups, N, S, d]
    rows = patches.mean(dim=2) if mode == "reduce" else patches.flatten(1, 2)
    rows = _with_one(rows, bias)
    factors = rows.mT @ rows / rows.shape[1]
    return factors if groups > 1 else factors[0]


def gradient_covariance(g: Tensor, *, groups: int = 1, mode: str = "expand") -> Tensor:
    """G = 1/N sum of g g^T over samples and positions of g [N, O] or [N, O, H, W]."""
    values = g.to(accumulator_dtype(g.dtype)).unflatten(1, (groups, -1))  # [N, groups, O/groups(, H, W)]
    if g.dim() == 4:
        values = values.sum(dim=(3, 4)) if mode == "reduce" else values.permute(0, 3, 4, 1, 2).flatten(0, 2)
    rows = values.transpose(0, 1)  # [groups, N or N S, O/groups]
    factors = rows.mT @ rows / g.shape[0]
    return factors if groups > 1 else factors[0]


def linear_covariance_(out: Tensor, x: Tensor, *, decay: float = 0.0, scale: float = 1.0, bias: bool = False) -> Tensor:
    """out <- decay out + scale linear_covariance(x)."""
    return _blend_(out, linear_covariance(x, bias=bias), decay, scale)


def conv2d_covariance_(
    out: Tensor, x: Tensor, kernel_size: Pair, *, decay: float = 0.0, scale: float = 1.0, **geometry: object
) -> Tensor:
    """out <- decay out + scale conv2d_covariance(x, kernel_size, ...)."""
    return _blend_(out, conv2d_covariance(x, kernel_size, **geometry), decay, scale)  # type: ignore[arg-type]


def gradient_covariance_(
    out: Tensor, g: Tensor, *, decay: float = 0.0, scale: float = 1.0, groups: int = 1, mode: str = "expand"
) -> Tensor:
    """out <- decay out + scale gradient_covariance(g)."""
    return _blend_(out, gradient_covariance(g, groups=groups, mode=mode), decay, scale)
