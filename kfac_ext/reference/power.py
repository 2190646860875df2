"""Power iteration, one matrix at a time, with a residual test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_ext.geometry import Pair, accumulator_dtype, conv_geometry


class PowerIteration(NamedTuple):
    """Dominant eigenpairs: `eigenvalues` [L], `eigenvectors` list of [n_i], `residuals` [L], `iterations` [L] int32.

    A residual is |A v - lambda v| / |lambda|, that of the vector which gave lambda = v^T A v.
    """

    eigenvalues: Tensor
    eigenvectors: list[Tensor]
    residuals: Tensor
    iterations: Tensor


def start_vector(n: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A fixed unit vector that no natural eigenvector is orthogonal to: entries 1 + 0.5 cos(1 + 1.7 i)."""
    index = torch.arange(n, dtype=torch.float64, device=device)
    vector = 1 + 0.5 * torch.cos(1 + 1.7 * index)
    return (vector / vector.norm()).to(dtype)


def iterate(
    product: Callable[[Tensor], Tensor], vector: Tensor, tol: float, max_iter: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """v <- A v / |A v| until |A v - lambda v| <= tol |lambda|; (lambda, v, residual, iterations)."""
    vector = vector / vector.norm()
    if not bool(vector.isfinite().all()):
        vector = start_vector(len(vector), vector.dtype, vector.device)
    eigenvalue = residual = vector.new_zeros(())
    steps = 0
    while steps < max_iter:
        steps += 1
        image = product(vector)
        eigenvalue = vector @ image
        norm = image.norm()
        residual = (image - eigenvalue * vector).norm() / eigenvalue.abs().clamp_min(torch.finfo(vector.dtype).tiny)
        if float(norm) == 0:  # the zero matrix (or a start in its kernel): keep the unit vector
            residual = vector.new_zeros(())
            break
        if not bool(norm.isfinite()):
            eigenvalue = residual = vector.new_full((), float("nan"))
            break
        vector = image / norm
        if float(residual) <= tol:
            break
    return eigenvalue, vector, residual, steps


def power_iteration(
    matrices: Sequence[Tensor],
    vectors: Sequence[Tensor] | None = None,
    *,
    tol: float = 1e-3,
    max_iter: int = 100,
) -> PowerIteration:
    """Dominant eigenpair of every symmetric matrix; see `kfac_ext.power_iteration`."""
    if vectors is None:
        vectors = [start_vector(m.shape[0], m.dtype, m.device) for m in matrices]
    results = [iterate(m.mv, v, tol, max_iter) for m, v in zip(matrices, vectors)]
    if not results:
        return PowerIteration(torch.zeros(0), [], torch.zeros(0), torch.zeros(0, dtype=torch.int32))
    values, units, residuals, steps = zip(*results)
    return PowerIteration(torch.stack(values), list(units), torch.stack(residuals), _counts(steps, values[0].device))


def covariance_power_iteration(
    x: Tensor,
    kernel_size: Pair | None = None,
    vector: Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    bias: bool = False,
    tol: float = 1e-3,
    max_iter: int = 100,
) -> PowerIteration:
    """Dominant eigenpair of the covariance of x without forming it; see `kfac_ext.covariance_power_iteration`."""
    if kernel_size is None:
        rows = x.reshape(-1, x.shape[-1])
    else:
        geometry = conv_geometry(x.shape, kernel_size, stride, padding, dilation, 1)
        image = F.pad(x, geometry.padding)
        rows = F.unfold(image, geometry.kernel_size, geometry.dilation, 0, geometry.stride).mT.flatten(0, 1)
    rows = rows.to(accumulator_dtype(x.dtype))
    if bias:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
    if vector is None:
        vector = start_vector(rows.shape[1], rows.dtype, rows.device)
    value, unit, residual, steps = iterate(lambda v: rows.T @ (rows @ v) / len(rows), vector, tol, max_iter)
    return PowerIteration(value[None], [unit], residual[None], _counts([steps], value.device))


def _counts(steps: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(steps, dtype=torch.int32, device=device)
