"""Scores of neurons and the compensation of survivors, one layer at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _blocks(matrix: Tensor, count: int, block: int) -> Tensor:
    """The `count` diagonal blocks [count, block, block] of a matrix (its last rows may be left over: the bias)."""
    used = matrix[: count * block, : count * block]
    return used.unflatten(0, (count, block)).unflatten(2, (count, block)).diagonal(dim1=0, dim2=2).movedim(-1, 0)


def _column_forms(weight: Tensor, G: Tensor, block: int) -> Tensor:
    """V_J^T G V_J [count, block, block] of every neuron j, J = its `block` columns of V = weight [O, d]."""
    count = weight.shape[1] // block
    columns = weight[:, : count * block].unflatten(1, (count, block)).transpose(0, 1)  # [count, O, block]
    return columns.mT @ (G @ columns)


def obd_saliency(
    weights: Sequence[Tensor], As: Sequence[Tensor], Gs: Sequence[Tensor], blocks: Sequence[int]
) -> list[Tensor]:
    """S_j = 1/2 tr(V_J^T G V_J A_JJ); see `kfac_ext.obd_saliency`."""
    scores = []
    for weight, A, G, block in zip(weights, As, Gs, blocks):
        forms = _column_forms(weight, G, block)
        scores.append(0.5 * (forms * _blocks(A, len(forms), block)).sum(dim=(1, 2)))
    return scores


def obs_saliency(
    weights: Sequence[Tensor], inverses: Sequence[Tensor], Gs: Sequence[Tensor], blocks: Sequence[int]
) -> list[Tensor]:
    """S_j = 1/2 tr(V_J^T G V_J (H_JJ)^-1); see `kfac_ext.obs_saliency`."""
    scores = []
    for i, (weight, inverse, G, block) in enumerate(zip(weights, inverses, Gs, blocks)):
        forms = _column_forms(weight, G, block)
        factors, info = torch.linalg.cholesky_ex(_blocks(inverse, len(forms), block))
        if bool(info.any()):
            neuron = int(info.nonzero()[0])
            raise torch.linalg.LinAlgError(
                f"obs_saliency: the block of neuron {neuron} in inverses[{i}] is not positive definite"
            )
        solved = torch.cholesky_solve(forms, factors)
        scores.append(0.5 * solved.diagonal(dim1=1, dim2=2).sum(dim=1))
    return scores


def compensate(weights: Sequence[Tensor], inverses: Sequence[Tensor], pruned: Sequence[Tensor]) -> list[Tensor]:
    """W_K - W_J (H_JJ)^-1 H_JK of every layer, J = the pruned columns, K = the rest; see `kfac_ext.compensate`."""
    kept = []
    for i, (weight, inverse, index) in enumerate(zip(weights, inverses, pruned)):
        keep = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
        keep[index] = False
        factor, info = torch.linalg.cholesky_ex(inverse[index][:, index])
        if bool(info.any()):
            raise torch.linalg.LinAlgError(
                f"compensate: inverses[{i}] at the columns pruned[{i}] is not positive definite"
            )
        update = torch.cholesky_solve(inverse[index][:, keep], factor)
        kept.append(weight[:, keep] - weight[:, index] @ update)
    return kept
