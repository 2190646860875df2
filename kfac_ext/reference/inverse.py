"""Damped inverses, one matrix at a time, through torch.linalg."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pi_damping(matrices: Sequence[Tensor], damping: float, pi: Sequence[tuple[int, int]]) -> list[Tensor]:
    """sqrt(damping) pi for A and sqrt(damping)/pi for G of each pair (A, G), pi = sqrt(mean diag A / mean diag G).

    Source: Martens & Grosse 2015, section 6.3. Matrices outside every pair get `damping`.
    """
    means = [matrix.diagonal().mean() for matrix in matrices]
    values = [mean.new_full((), damping) for mean in means]
    for i, j in pi:
        ratio = (means[i] / means[j]).sqrt()
        ratio = torch.where(ratio.isfinite() & (ratio > 0), ratio, torch.ones_like(ratio))
        values[i], values[j] = damping**0.5 * ratio, damping**0.5 / ratio
    return values


def damped_inverse_ex(
    matrices: Sequence[Tensor],
    damping: float | Sequence[float | Tensor] | Tensor,
    *,
    pi: Sequence[tuple[int, int]] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Inverses and LAPACK-style info of every matrix; see `kfac_ext.damped_inverse_ex`."""
    if pi is not None:
        damping = pi_damping(matrices, float(damping), pi)  # type: ignore[arg-type]
    inverses, infos = [], []
    for i, matrix in enumerate(matrices):
        one_each = isinstance(damping, Sequence) or (isinstance(damping, Tensor) and damping.dim() > 0)
        amount = damping[i] if one_each else damping  # type: ignore[index]
        diagonal = torch.as_tensor(amount, dtype=matrix.dtype, device=matrix.device).expand(matrix.shape[0])
        factor, info = torch.linalg.cholesky_ex(matrix + torch.diag(diagonal))
        info = _first_not_finite(factor, info)
        eye = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
        inverse = torch.cholesky_inverse(torch.where(info == 0, factor, eye))  # which refuses a pivot of zero
        inverse = inverse.tril() + inverse.tril(-1).mT  # on some devices neither symmetric to the last bit nor by rows
        inverses.append(torch.where(info == 0, inverse, torch.full_like(inverse, float("nan"))))
        infos.append(info.to(torch.int32))
    return inverses, torch.stack(infos) if infos else torch.zeros(0, dtype=torch.int32)


def _first_not_finite(factor: Tensor, info: Tensor) -> Tensor:
    """info, which lets an infinite pivot pass, and on some devices NaN."""
    bad = ~factor.diagonal().isfinite()
    return torch.where((info == 0) & bad.any(), bad.int().argmax() + 1, info).to(info.dtype)


def damped_inverse(
    matrices: Sequence[Tensor],
    damping: float | Sequence[float | Tensor] | Tensor,
    *,
    pi: Sequence[tuple[int, int]] | None = None,
) -> list[Tensor]:
    """(M_i + damping_i I)^-1 of every matrix; see `kfac_ext.damped_inverse`."""
    inverses, info = damped_inverse_ex(matrices, damping, pi=pi)
    if bool((info != 0).any()):
        failed = info.nonzero().flatten().tolist()
        raise torch.linalg.LinAlgError(f"damped_inverse: matrices {failed} are not positive definite")
    return inverses
