"""Symmetric matrices as n (n + 1) / 2 numbers, by copies of blocks alone: no index is held.

The rectangular full packed form of LAPACK (Gustavson, Wasniewski, Dongarra & Langou 2010): with p = ceil(n/2), the
square M[p:, :p] lies as it is, and the triangles of M[:p, :p] and M[p:, p:] fill one rectangle, each below or above
the diagonal that belongs to the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def packed_size(shape: Sequence[int]) -> int:
    """How many numbers matrices of this shape, [..., n, n], are packed into."""
    *groups, n, _ = shape
    return torch.Size(groups).numel() * (n * (n + 1) // 2)


def pack_(packed: Tensor, matrix: Tensor) -> None:
    """Write symmetric matrices [..., n, n] into `packed`, one dimension of `packed_size` numbers."""
    p = -(-matrix.shape[-1] // 2)
    square, rectangle = _parts(packed, matrix.shape)
    square.copy_(matrix[..., p:, :p])
    first, second = _triangles(rectangle, matrix.shape[-1])
    rectangle.zero_()
    first.copy_(matrix[..., :p, :p].tril())
    second.add_(matrix[..., p:, p:].triu())


def unpacked(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The matrices [..., n, n] of this shape that were packed, exactly symmetric."""
    n = shape[-1]
    p = -(-n // 2)
    square, rectangle = _parts(packed, shape)
    first, second = _triangles(rectangle, n)
    matrix = packed.new_empty(tuple(shape))
    matrix[..., p:, :p] = square
    matrix[..., :p, p:] = square.mT
    matrix[..., :p, :p] = first.tril() + first.tril(-1).mT
    matrix[..., p:, p:] = second.triu() + second.triu(1).mT
    return matrix


def _parts(packed: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The square and the rectangle of every matrix, views."""
    *groups, n, _ = shape
    p, q = -(-n // 2), n // 2
    rows = packed.view(*groups, n * (n + 1) // 2)
    square, rectangle = rows.split([q * p, p * (p + 1 - n % 2)], dim=-1)
    return square.unflatten(-1, (q, p)), rectangle.unflatten(-1, (-1, p))


def _triangles(rectangle: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Views of a rectangle in which the first matrix is the lower and the second the upper triangle."""
    if n % 2:
        return rectangle, rectangle[..., :-1, 1:]
    return rectangle[..., 1:, :], rectangle[..., :-1, :]
