"""Checks of the layers and neurons of a greedy selection."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfac_ext.ops._launch import full_precision
from kfac_ext.ops._lists import check_count, check_matrix, check_square

_ROWS_TOGETHER = 256
_ASYMMETRY = {torch.float32: 1e-4, torch.float64: 1e-9}  # of the largest entry; an inverse by other means may have some


def check_layers(operation: str, weights: Sequence[Tensor], inverses: Sequence[Tensor], Gs: Sequence[Tensor]) -> None:
    """Raise unless there is a V, a symmetric H and a symmetric G for each layer, of one dtype and device."""
    if not weights:
        raise ValueError(f"{operation}: weights is empty, expected one a layer")
    for name, given in (("inverses", inverses), ("Gs", Gs)):
        check_count(operation, name, len(given), len(weights), "weights")
    for i, (weight, inverse, G) in enumerate(zip(weights, inverses, Gs)):
        check_matrix(operation, f"weights[{i}]", weight, weights[0])
        check_square(operation, f"inverses[{i}]", inverse, weights[0], weight.shape[1])
        check_square(operation, f"Gs[{i}]", G, weights[0], weight.shape[0])
        _check_symmetric(operation, f"inverses[{i}]", inverse)
        _check_symmetric(operation, f"Gs[{i}]", G)


def _check_symmetric(operation: str, name: str, matrix: Tensor) -> None:
    """Compare M x with M^T x for one x, which takes two passes over M; entry by entry only where they differ."""
    if _seems_symmetric(matrix):
        return
    worst, largest = matrix.new_zeros(()), matrix.new_zeros(())
    for first in range(0, len(matrix), _ROWS_TOGETHER):  # a difference as large as the matrix would double the memory
        rows = matrix[first : first + _ROWS_TOGETHER, : first + _ROWS_TOGETHER]
        across = matrix[: first + _ROWS_TOGETHER, first : first + _ROWS_TOGETHER].mT
        worst, largest = torch.maximum(worst, (rows - across).abs().max()), torch.maximum(largest, rows.abs().max())
    if bool(worst > _ASYMMETRY[matrix.dtype] * largest):  # NaN is no asymmetry
        raise ValueError(
            f"{operation}: {name} is not symmetric, entries across the diagonal differ by {float(worst):.3g}"
        )


def _seems_symmetric(matrix: Tensor) -> bool:
    """Whether (M - M^T) x is below what entries may differ by, for an x of random entries of size 1 to 2."""
    generator = torch.Generator().manual_seed(len(matrix))
    x = torch.rand(len(matrix), generator=generator) + 1
    x = (x * (2 * torch.randint(0, 2, (len(matrix),), generator=generator) - 1)).to(matrix.device, matrix.dtype)
    with full_precision(matrix.device):
        difference = (matrix @ x - matrix.mT @ x).abs().max()
    return bool(difference <= _ASYMMETRY[matrix.dtype] * matrix.diagonal().abs().max())


def check_columns(operation: str, columns: Sequence[Tensor], layers: Sequence[int], weights: Sequence[Tensor]) -> None:
    """Raise unless each list has distinct columns of its layer, none of them in two lists."""
    if not columns:
        raise ValueError(f"{operation}: columns is empty, expected one list of neurons or more")
    check_count(operation, "layers", len(layers), len(columns), "columns")
    taken = [torch.zeros(weight.shape[1], dtype=torch.bool) for weight in weights]
    for i, (index, layer) in enumerate(zip(columns, layers)):
        if not 0 <= layer < len(weights):
            raise ValueError(f"{operation}: layers[{i}] is {layer}, expected one of the {len(weights)} layers")
        if index.dtype != torch.int64 or index.dim() != 2 or not index.numel():
            raise TypeError(
                f"{operation}: columns[{i}] has dtype {index.dtype} and shape {tuple(index.shape)}, expected int64 "
                "[neurons, block]"
            )
        listed, width = index.flatten().cpu(), weights[layer].shape[1]
        if int(listed.min()) < 0 or int(listed.max()) >= width:
            raise ValueError(
                f"{operation}: columns[{i}] has indices from {int(listed.min())} to {int(listed.max())}, expected "
                f"columns 0 to {width - 1} of weights[{layer}]"
            )
        if len(listed.unique()) < len(listed) or bool(taken[layer][listed].any()):
            raise ValueError(f"{operation}: columns[{i}] names a column twice, or one of another neuron of the layer")
        taken[layer][listed] = True
