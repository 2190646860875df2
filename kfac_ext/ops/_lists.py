"""Checks of arguments that are lists of tensors, one a matrix or layer; every error names the place in the list."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfac_ext.ops._library import check_floating

FACTOR_DTYPES = (torch.float32, torch.float64)


def as_list(operation: str, name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    """`tensors` as a list without gradients; raise unless it is a sequence (or a stack) of tensors."""
    if not isinstance(tensors, (Sequence, Tensor)) or isinstance(tensors, str):
        raise TypeError(f"{operation}: {name} is a {type(tensors).__name__}, expected a list of tensors")
    if isinstance(tensors, Tensor) and tensors.dim() == 0:
        raise TypeError(f"{operation}: {name} is one number, expected a list of tensors")
    items = list(tensors)
    for i, item in enumerate(items):
        if not isinstance(item, Tensor):
            raise TypeError(f"{operation}: {name}[{i}] is a {type(item).__name__}, expected a tensor")
    return [item.detach() if item.requires_grad else item for item in items]


def check_count(operation: str, name: str, given: int, wanted: int, of: str) -> None:
    """Raise unless a list has an entry for each entry of the list `of`."""
    if given != wanted:
        raise ValueError(f"{operation}: {name} has {given} entries, expected {wanted}: one for each of {of}")


def check_matrix(operation: str, name: str, tensor: Tensor, like: Tensor) -> None:
    """Raise unless `tensor` is a matrix of float32 or float64, of the dtype and on the device of `like`."""
    check_floating(operation, name, tensor)
    if tensor.dtype not in FACTOR_DTYPES:
        raise TypeError(f"{operation}: {name} has dtype {tensor.dtype}, expected float32 or float64")
    if tensor.dim() != 2:
        raise ValueError(f"{operation}: {name} has {tensor.dim()} dimensions {tuple(tensor.shape)}, expected 2")
    if tensor.dtype != like.dtype:
        raise TypeError(f"{operation}: {name} has dtype {tensor.dtype}, the first matrix {like.dtype}: expected one")
    if tensor.device != like.device:
        raise ValueError(f"{operation}: {name} is on {tensor.device}, the first matrix on {like.device}: expected one")


def check_squares(operation: str, name: str, tensors: Sequence[Tensor], like: Tensor) -> None:
    """Raise unless `tensors` are square matrices of float32 or float64, of the dtype and on the device of `like`."""
    dtype, device = like.dtype, like.device
    if dtype not in FACTOR_DTYPES:
        check_square(operation, f"{name}[0]", like, like)
    for i, tensor in enumerate(tensors):
        shape = tensor.shape
        if (
            len(shape) != 2
            or shape[0] != shape[1]
            or shape[0] == 0
            or tensor.dtype != dtype
            or tensor.device != device
            or tensor.layout != torch.strided
        ):  # which of these it is takes longer to find out
            check_square(operation, f"{name}[{i}]", tensor, like)


def check_square(operation: str, name: str, tensor: Tensor, like: Tensor, size: int | None = None) -> None:
    """Raise unless `tensor` is a square matrix, of this size if one is given, that goes with `like`."""
    check_matrix(operation, name, tensor, like)
    n = tensor.shape[0] if size is None else size
    if tuple(tensor.shape) != (n, n):
        raise ValueError(
            f"{operation}: {name} has shape {tuple(tensor.shape)}, expected {(n, n) if size else '[n, n]'}"
        )


def row_major(matrix: Tensor) -> Tensor:
    """`matrix`, or a copy if its rows are not contiguous one after the other."""
    row, column = matrix.stride()
    return matrix if column == 1 and row >= matrix.shape[1] else matrix.contiguous()


def check_index(operation: str, name: str, index: Tensor, dims: Sequence[str]) -> None:
    """Raise unless `index` is a dense int64 tensor with these dimensions."""
    if index.dtype != torch.int64 or index.dim() != len(dims) or index.layout != torch.strided:
        layout = "" if index.layout == torch.strided else f" and layout {index.layout}"
        raise TypeError(
            f"{operation}: {name} has dtype {index.dtype} and shape {tuple(index.shape)}{layout}, expected int64 "
            f"[{', '.join(dims)}]"
        )
