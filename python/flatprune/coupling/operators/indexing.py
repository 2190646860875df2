"""Operators that pick or place entries by indices."""

from __future__ import annotations

from torch import Tensor

from flatprune.coupling import algebra
from flatprune.coupling.neurons import CHANNELWISE, PRODUCER
from flatprune.coupling.operators.table import Operation, rule
from flatprune.coupling.values import Value, varying

LOOKED_UP = "its rows are looked up:"  # nobody expects entries of a vocabulary to go


@rule("index gather take_along_dim _unsafe_index")
def pick(op: Operation) -> Value:
    """The same picks from the labels; a parameter is a table whose rows are looked up."""
    value = op.value()
    if value.param and op.name == "index":
        indexed = [d for d, index in enumerate(op.args[1]) if index is not None]
        value = algebra.refused_along(op.labels, value, indexed, LOOKED_UP)
        algebra.note_role(op.labels, value, CHANNELWISE)
        value = value.having(param=False)
        return algebra.moved(value, lambda full: op.func(full, *op.args[1:], **op.kwargs), op.shape)
    return algebra.moved(op.value(), lambda full: op.func(full, *op.args[1:], **op.kwargs), op.shape)


@rule("embedding _embedding_bag")
def embedding(op: Operation) -> list[Value]:
    """Columns are made; rows are looked up and stay."""
    table = algebra.refused_along(op.labels, op.value(), [0], LOOKED_UP)
    algebra.note_role(op.labels, table, PRODUCER)
    rank = len(op.shape)
    layers = tuple(layer.reshape([1] * (rank - 1) + [-1]) for layer in table.layers)
    return [Value(op.shape, layers)]


@rule("index_add scatter_add index_copy scatter scatter_reduce index_reduce index_fill")
def place(op: Operation) -> Value:
    """Rows along `dim` take others' values; labels along it cannot go."""
    dim = op.argument("dim", 0) % max(len(op.shape), 1)
    values = [op.value()] + [op.value_of(t) for t in op.args[2:] if isinstance(t, Tensor) and t.is_floating_point()]
    flat = []
    for value in values:
        value = algebra.refused_along(op.labels, value, [dim])
        if value.rank == len(op.shape):
            flat.append(value.having(size=tuple(1 if d == dim else n for d, n in enumerate(value.size))))
    size = tuple(1 if d == dim else n for d, n in enumerate(op.shape))
    size = tuple(max(v.size[d] for v in flat) if flat else n for d, n in enumerate(size))
    return algebra.combine(op.labels, flat, size).having(size=op.shape)


@rule("index_put _index_put_impl masked_scatter")
def put(op: Operation) -> Value:
    """Rows that indices choose are written: channels stand last and are not indexed."""
    m, target = op.labels, op.value()
    source = op.value(2)
    indexed = {i for i, index in enumerate(op.args[1]) if index is not None} if op.name != "masked_scatter" else {0}
    last = target.rank - 1
    values = []
    for value in (target, source):
        layers = []
        for layer in value.layers:
            if varying(layer) == {value.rank - 1} and last not in indexed:
                layers.append(layer.reshape([1] * last + [-1]))
            else:
                m.findings.pin(layer, f"it is written by {m.where}")
        width = value.size[-1] if value.rank else 1
        values.append(Value((*[1] * last, width), tuple(layers), free=value.free and not layers))
    return algebra.combine(m, values, (*[1] * last, target.size[-1])).having(size=target.size)
