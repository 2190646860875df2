"""Norms over the channels that are not masked."""

from __future__ import annotations

import torch
from torch import Tensor

from flatprune.coupling.operators.table import Operation

JOINT_NORMS = frozenset(
    ("native_layer_norm", "_fused_rms_norm", "rms_norm", "native_group_norm", "_weight_norm_interface")
)


def norm_of_survivors(op: Operation, stays: Tensor) -> Tensor:
    """Layer, root-mean-square, group or batch norm over the entries that stay, 0 elsewhere.

    Args:
        op: the norm, of x.
        stays: bool, of the shape of x.
    """
    x = op.args[0]
    weight, bias = _affine(op, x)
    eps = op.argument("eps")
    rows, alive = x, stays.to(x.dtype).expand(x.shape)
    if op.name == "native_group_norm":
        groups = op.argument("group")
        rows, alive = (t.reshape(len(x), groups, -1) for t in (rows, alive))
        dims: tuple[int, ...] = (2,)
    elif op.name not in JOINT_NORMS:  # a batch norm
        dims = (0, *range(2, x.dim()))
    else:
        dims = tuple(range(x.dim() - len(op.args[1]), x.dim()))
    count = alive.sum(dim=dims, keepdim=True).clamp_min(1)
    if "rms" in op.name:
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        values = rows * ((alive * rows.square()).sum(dim=dims, keepdim=True) / count + eps).rsqrt()
    else:
        mean = (alive * rows).sum(dim=dims, keepdim=True) / count
        variance = (alive * (rows - mean).square()).sum(dim=dims, keepdim=True) / count
        values = (rows - mean) * (variance + eps).rsqrt()
    values = values.view(x.shape)
    values = values if weight is None else values * weight
    return stays * (values if bias is None else values + bias)


def _affine(op: Operation, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    vectors = [op.argument("weight"), op.argument("bias")]
    shape = [1, -1, *[1] * (x.dim() - 2)] if op.name == "native_group_norm" or op.name not in JOINT_NORMS else None
    found = [t if t is None or shape is None else t.view(shape) for t in vectors]
    return found[0], found[1]
