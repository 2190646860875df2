"""Operators that move entries: the very same operator on the labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flatprune.coupling import algebra
from flatprune.coupling.operators.table import Operation, rule
from flatprune.coupling.values import Value, aligned, canonical_layers, varying

_RESHAPING = ("view", "_unsafe_view")


@rule(
    "view permute transpose t expand slice select unsqueeze squeeze unbind split split_with_sizes chunk unfold "
    "diagonal unflatten narrow alias detach as_strided movedim swapaxes view_as_real view_as_complex _reshape_alias "
    "_unsafe_view unsafe_split unsafe_split_with_sizes unsafe_chunk squeeze_copy expand_copy _reshape_copy "
    "flip roll repeat repeat_interleave pixel_shuffle pixel_unshuffle index_select im2col rot90 tile",
    always=True,
)
def move(op: Operation) -> list[Value]:
    """Views and copies that keep every entry what it is."""
    source, value = op.args[0], op.value()
    if op.name == "repeat_interleave" and not value.layers:  # the overload that only makes indices
        return [Value(tuple(t.shape)) for t in op.outputs]
    many = isinstance(op.out, (tuple, list))
    if "split" in op.name or "chunk" in op.name:
        _note_pieces(op, value)
    results = []
    for i, out in enumerate(op.outputs):
        take = _taking(op, i if many else None)
        result = _moved(value, take, out)
        if op.name == "expand":
            size = (1,) * (out.dim() - value.rank) + tuple(value.size)
            new = {d for d in range(-out.dim(), 0) if size[d] == 1 < out.shape[d]}
            result = result.having(loose=frozenset(new | set(value.loose)))
        results.append(result)
        if out is not source and not value.param and shares_memory(out, source):
            op.labels.note_view(out, source, value, take)
    return results


@rule("_pack_padded_sequence")
def pack(op: Operation) -> list[Value]:
    """Rows of all sequences that are no padding, in one; and how many at each step."""
    rows, counts = op.outputs
    moved = _moved(op.value(), lambda full: op.func(full, *op.args[1:])[0], rows)
    return [moved, Value(tuple(counts.shape))]


def _moved(value: Value, take: Callable[[Tensor], Tensor], out: Tensor) -> Value:
    return algebra.moved(value, take, out.shape)


def _taking(op: Operation, pick: int | None) -> Callable[[Tensor], Tensor]:
    def take(full: Tensor) -> Tensor:
        if op.name in _RESHAPING:
            try:
                return full.view(op.args[1])
            except RuntimeError:
                return full.reshape(op.args[1])
        if op.name.startswith("view_as_"):  # a number is a pair or the other way round
            return full[..., None].expand(*full.shape, 2) if op.name == "view_as_real" else full[..., 0]
        result = op.func(full, *op.args[1:], **op.kwargs)
        return result if pick is None else result[pick]

    return take


def shares_memory(a: Tensor, b: Tensor) -> bool:
    """Whether one is a view of the other, or both of a third."""
    try:
        return a.untyped_storage()._cdata == b.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return False


def _note_pieces(op: Operation, value: Value) -> None:
    """Pieces of equal size, which the code may ask for."""
    dim = op.argument("dim", 0) % max(value.rank, 1)
    sizes = {out.shape[dim] for out in op.outputs}
    if len(op.outputs) < 2 or len(sizes) > 1:
        return
    for layer in value.layers:
        if dim in varying(layer):
            op.labels.findings.split(layer.split(sizes.copy().pop(), dim))


@rule("channel_shuffle native_channel_shuffle")
def channel_shuffle(op: Operation) -> list[Value]:
    """Channels of several groups in turn: as many must stay in each."""
    for layer in op.value().layers:
        if varying(layer) == {1}:
            op.labels.findings.grid(layer.reshape(op.args[1], -1), op.labels.where)
    return move(op)  # type: ignore[return-value]


@rule("constant_pad_nd")
def pad(op: Operation) -> Value:
    """New entries along a labelled dimension cannot go."""
    value, widths = op.value(), op.args[1]
    padded = {value.rank - 1 - i // 2 for i, n in enumerate(widths) if n}
    layers = [
        torch.constant_pad_nd(layer.expand(value.size), widths, -1 if padded & varying(layer) else 0)
        for layer in value.layers
    ]
    return Value(op.shape, canonical_layers(layers), free=value.free, stats=value.stats)


@rule("cat concat concatenate")
def cat(op: Operation) -> Value:
    """Along the joined dimension labels follow each other; others are one."""
    values = [op.value_of(t) for t in op.args[0] if t.shape != (0,)]
    return algebra.joined(op.labels, values, op.argument("dim", 0), op.shape)


@rule("stack")
def stack(op: Operation) -> Value:
    """Concatenation along a new dimension."""
    dim = op.argument("dim", 0) % len(op.shape)
    values = []
    for tensor in op.args[0]:
        value = op.value_of(tensor)
        dims: list[Any] = list(range(value.rank))
        values.append(value.shaped([*dims[:dim], None, *dims[dim:]]))
    return algebra.joined(op.labels, values, dim, op.shape)


@rule("copy", always=True)
def copy(op: Operation) -> Value:
    """The target takes the source's labels."""
    target, source = op.value(), op.value(1)
    if target.layers and source.layers:  # a part is written over by what is computed of it: equally wide
        algebra.combine(op.labels, [target, source], target.size)
    layers = tuple(aligned(layer, target.rank) for layer in source.layers)
    return Value(target.size, layers, free=source.free and target.free, stats=source.stats)
