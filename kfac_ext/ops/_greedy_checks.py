"""Checks of the layers and neurons of a greedy selection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kfac_ext.geometry import is_int
from kfac_ext.ops._launch import full_precision
from kfac_ext.ops._lists import FACTOR_DTYPES, check_count, check_index, check_matrix, check_square, row_major

if TYPE_CHECKING:
    from kfac_ext.ops._greedy_kernels import Layer, Neurons

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
        if not is_int(layer) or not 0 <= layer < len(weights):
            raise ValueError(f"{operation}: layers[{i}] is {layer!r}, expected one of the {len(weights)} layers")
        check_index(operation, f"columns[{i}]", index, ["neurons", "block"])
        if not index.numel():
            raise ValueError(f"{operation}: columns[{i}] has shape {tuple(index.shape)}, expected [neurons, block]")
        listed, width = index.flatten().cpu(), weights[layer].shape[1]
        if int(listed.min()) < 0 or int(listed.max()) >= width:
            raise ValueError(
                f"{operation}: columns[{i}] has indices from {int(listed.min())} to {int(listed.max())}, expected "
                f"columns 0 to {width - 1} of weights[{layer}]"
            )
        if len(listed.unique()) < len(listed) or bool(taken[layer][listed].any()):
            raise ValueError(f"{operation}: columns[{i}] names a column twice, or one of another neuron of the layer")
        taken[layer][listed] = True


def check_step(operation: str, problems: Sequence[Layer], lists: Sequence[Neurons]) -> None:
    """Raise unless what a step works on is laid out as kernels read it; which columns it names the CPU's kernel checks.

    It is called for every step: what is right is found out in few questions.
    """
    if not problems or not lists:
        raise ValueError(f"{operation}: {'columns' if problems else 'weights'} is empty")
    first = problems[0].weight
    if first.dtype not in FACTOR_DTYPES:
        raise TypeError(f"{operation}: weights[0] has dtype {first.dtype}, expected float32 or float64")
    for i, layer in enumerate(problems):
        if layer.weight.dim() != 2:
            raise ValueError(f"{operation}: weights[{i}] has {layer.weight.dim()} dimensions, expected 2")
        (outputs, columns), pending = layer.weight.shape, layer.pending
        for name, matrix, shape in (
            ("weights", layer.weight, (outputs, columns)),
            ("inverses", layer.inverse, (columns, columns)),
            ("Gs", layer.G, (outputs, outputs)),
        ):
            _check_layout(operation, f"{name}[{i}]", matrix, first, shape, rows_apart=True)
        _check_layout(operation, f"pending[{i}]", pending, first, (pending.shape[0] if pending.dim() else 0, outputs))
        _check_layout(operation, f"removed[{i}]", layer.removed, first, (columns,), dtype=torch.int64)
        _check_layout(operation, f"lost[{i}]", layer.lost, first, (layer.lost.numel(),), dtype=torch.int64)
    for i, neurons in enumerate(lists):
        if not 0 <= neurons.layer < len(problems):
            raise ValueError(f"{operation}: layers[{i}] is {neurons.layer}, expected one of {len(problems)} layers")
        if neurons.columns.dim() != 2 or not neurons.columns.numel():
            raise ValueError(
                f"{operation}: columns[{i}] has shape {tuple(neurons.columns.shape)}, expected 2 dimensions"
            )
        count, block = neurons.columns.shape
        _check_layout(operation, f"columns[{i}]", neurons.columns, first, (count, block), dtype=torch.int64)
        for name, blocks in (("blocks", neurons.blocks), ("forms", neurons.forms)):
            _check_layout(operation, f"{name}[{i}]", blocks, first, (count, block, block), dtype=torch.float64)
        _check_layout(operation, f"scores[{i}]", neurons.scores, first, (count,), dtype=torch.float64)


def _check_layout(
    operation: str,
    name: str,
    tensor: Tensor,
    like: Tensor,
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype | None = None,
    rows_apart: bool = False,
) -> None:
    """Raise unless a tensor has this shape and dtype (default: that of `like`), is where `like` is and contiguous."""
    wanted = like.dtype if dtype is None else dtype
    if tensor.shape == shape and tensor.dtype == wanted and tensor.device == like.device:
        if tensor.layout == torch.strided and (tensor.is_contiguous() or (rows_apart and row_major(tensor) is tensor)):
            return
        raise ValueError(f"{operation}: {name} is not contiguous, its strides are {tensor.stride()}")
    raise ValueError(
        f"{operation}: {name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, expected {wanted} {shape} "
        f"on {like.device}"
    )
