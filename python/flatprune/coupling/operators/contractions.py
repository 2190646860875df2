"""Operators that multiply and sum: what they sum over is read, what is left of a parameter is made."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from flatprune.coupling import algebra
from flatprune.coupling.findings import Product
from flatprune.coupling.labels import Labels
from flatprune.coupling.neurons import CHANNELWISE, CONSUMER, PRODUCER
from flatprune.coupling.operators.pointwise import vector
from flatprune.coupling.operators.table import Operation, rule
from flatprune.coupling.values import Axis, Value, labels_of, varying

Dims = Sequence[int | None]
_GROUPED_ALIGNMENT = 8  # widths that torch's grouped product takes: 16 bytes of the narrowest dtype


def _contracted(op: Operation, a: Value, a_dims: Dims, b: Value, b_dims: Dims, k: int, times: int = 1) -> Value:
    """Sum over dimension k of the product, to which each operand gives its dimensions."""
    return algebra.contract(op.labels, a.shaped(a_dims), b.shaped(b_dims), k, times)


def _product(op: Operation, a: Value, b: Value) -> Value:
    """Matrix, batched or vector product by rank."""
    ranks = a.rank, b.rank
    if ranks == (3, 3):
        return _contracted(op, a, (0, 1, 2, None), b, (0, None, 1, 2), 2)
    if ranks == (2, 2):
        return _contracted(op, a, (0, 1, None), b, (None, 0, 1), 1)
    if ranks == (2, 1):
        return _contracted(op, a, (0, 1), b, (None, 0), 1)
    return _contracted(op, a, (0,), b, (0,), 0)


@rule("mm bmm mv dot vdot", always=True)
def product(op: Operation) -> Value:
    """[m, k] [k, n], batches of such, a vector on either side."""
    return _product(op, op.value(0), op.value(1))


@rule("addmm baddbmm addmv", always=True)
def product_and_sum(op: Operation) -> Value:
    """The same with something added."""
    result = _product(op, op.value(1), op.value(2))
    return algebra.combine(op.labels, [result, op.value(0)], op.shape)


@rule("linear", always=True)
def linear(op: Operation) -> Value:
    """x [..., I], weight [O, I], bias [O]: where a backend has it as one operator."""
    x, weight = op.value(0), op.value(1)
    rank = x.rank
    dims = [*range(rank), None]
    result = _contracted(op, x, dims, weight, [*[None] * (rank - 1), 1, 0], rank - 1)
    bias = op.argument("bias")
    return result if bias is None else algebra.combine(op.labels, [result, op.value_of(bias)], op.shape)


@rule("_grouped_mm", always=True)
def experts(op: Operation) -> Value:
    """Rows [n, k], each by the matrix of its expert [experts, k, n]; experts stay."""
    a, b = op.value(0), op.value(1)
    if (a.rank, b.rank) != (2, 3):
        for value in (a, b):
            algebra.refused_along(op.labels, value, range(value.rank))
        return Value(op.shape)
    for layer in (*a.layers, *b.layers):
        op.labels.findings.multiples.append((labels_of(layer), _GROUPED_ALIGNMENT))
    b = algebra.refused_along(op.labels, b, [0], "its experts are chosen by")
    b = b.having(size=b.size[1:], layers=tuple(layer[0] for layer in b.layers))
    return _contracted(op, a, (0, 1, None), b, (None, 0, 1), 1).having(size=op.shape)


@rule(
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math "
    "_scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math_for_mps"
)
def attention(op: Operation) -> list[Value]:
    """softmax(q k^T + mask) v of q, k, v [batch, heads, positions, size]; fewer heads of k and v are repeated."""
    q, k, v = (op.value(i) for i in range(3))
    k, v = (_repeated_heads(value, q.size[1]) for value in (k, v))
    scores = _contracted(op, q, (0, 1, 2, None, 3), k, (0, 1, None, 2, 3), 4)
    mask = op.argument("attn_mask", op.argument("attn_bias"))
    if isinstance(mask, Tensor):
        scores = algebra.combine(op.labels, [scores, op.value_of(mask)], scores.size)
    scores = algebra.refused_along(op.labels, scores, [-1])
    result = _contracted(op, scores, (0, 1, 2, 3, None), v, (0, 1, None, 2, 3), 3)
    rest = [Value(tuple(t.shape)) for t in op.outputs[1:]]
    return [result.having(size=op.shape), *rest]


def _repeated_heads(value: Value, heads: int) -> Value:
    times = heads // value.size[1]
    if times == 1:
        return value
    layers = tuple(layer.repeat_interleave(times, 1) if layer.shape[1] > 1 else layer for layer in value.layers)
    return value.having(size=(value.size[0], heads, *value.size[2:]), layers=layers)


@rule("convolution _convolution cudnn_convolution mkldnn_convolution", always=True)
def convolution(op: Operation) -> Value:
    """x [N, I, ...], weight [O, I/groups, kernel] or, transposed, [I, O/groups, kernel]; kernels stay."""
    x, w, bias = op.args[0], op.args[1], op.argument("bias")
    groups, transposed = op.argument("groups", 1), op.argument("transposed", False)
    spatial = w.dim() - 2
    positions = range(2, 2 + spatial)
    value, weight = op.value_of(x), op.value_of(w)
    if value.rank == spatial + 1:
        value = value.shaped([None, *range(value.rank)])
    value = algebra.collapsed(op.labels, value, positions)
    value = value.having(size=(*value.size[:2], *[1] * spatial))
    weight = algebra.refused_along(op.labels, weight, positions, "the kernel of it stays:")
    weight = weight.having(size=(*weight.size[:2], *[1] * spatial))
    if groups == 1:
        order = (None, *((1, 0) if not transposed else (0, 1)), *positions)  # [., I, O, ...]
        result = _contracted(op, value, (0, 1, None, *positions), weight, order, 1, _applications(op, w, transposed))
    else:
        result = _grouped(op, value, w, groups, transposed)
    size = op.shape if len(op.shape) == 2 + spatial else (1, *op.shape)
    if isinstance(bias, Tensor):
        added = vector(op.value_of(bias), 2 + spatial, 1)
        result = algebra.combine(op.labels, [result.having(size=(*size[:2], *[1] * spatial)), added], size)
    result = result.having(size=size)
    return result if len(op.shape) == 2 + spatial else result.shaped(range(1, 2 + spatial))


def _applications(op: Operation, w: Tensor, transposed: bool) -> int:
    """How often a convolution applies its matrix to one sample: positions times entries of the kernel."""
    places = op.args[0].shape if transposed else op.outputs[0].shape
    return math.prod(places[len(places) - (w.dim() - 2) :]) * math.prod(w.shape[2:])


def _grouped(op: Operation, value: Value, w: Tensor, groups: int, transposed: bool) -> Value:
    """A grouped convolution has an axis of all its inputs (transposed: outputs); one input a group acts channelwise."""
    m = op.labels
    spatial = w.dim() - 2
    outputs = w.shape[1] * groups if transposed else w.shape[0]
    blank = Value((value.size[0], outputs, *[1] * spatial))
    key = m.parameter_key(w)
    algebra.refuse_statistics(m, value)
    for layer in value.layers:
        if varying(layer) != {1}:
            m.findings.pin(layer, f"it meets a grouped convolution ({m.where})")
    layers = [layer for layer in value.layers if varying(layer) == {1}]
    seen = layers[0].reshape(groups, -1) if layers else None
    of_one = w.shape[0] // groups if transposed else w.shape[1]
    m.findings.products.append(
        Product(m.here, _applications(op, w, transposed), (value.size[0], outputs, of_one), [], 2)
    )
    if key is None:
        return blank.having(layers=_computed(op, w, groups, transposed, seen, value.free))
    first = m.table.axis(key, 0, w.shape[0])
    second = m.table.axis(key, 1, w.shape[1] * groups, groups) if w.shape[1] > 1 else None
    if second is None or (transposed and w.shape[0] == groups):
        rows = _one_input_a_group(op, first, second, groups, seen, value.free)
    else:
        rows = _blocks(op, first, second, groups, transposed, seen, value.free)
    if rows is None:
        return blank
    columns = None if second is None or transposed else second
    _label_product(m, rows, first if transposed else columns, groups)
    return blank.having(layers=(_by_group(rows, groups).reshape([1, -1, *[1] * spatial]),))


def _label_product(m: Labels, rows: Axis, columns: Axis | None, groups: int) -> None:
    """The product of a grouped convolution, with labels: outputs [1, O, 1] and inputs of one group [1, 1, I/groups]."""
    last = m.findings.products[-1]
    layers = [rows.labels().reshape(1, -1, 1)]
    if columns is not None and columns.size > groups:
        layers.append(columns.labels().reshape(groups, -1)[0].reshape(1, 1, -1))
    m.findings.products[-1] = last._replace(layers=layers)


def _computed(
    op: Operation, w: Tensor, groups: int, transposed: bool, seen: Tensor | None, free: bool
) -> tuple[Tensor, ...]:
    """A weight that the forward computes (a normed one, say): the same input of every group is one neuron."""
    m, weight = op.labels, op.value_of(w)
    spatial = w.dim() - 2
    algebra.note_role(m, weight, CONSUMER, {0 if transposed else 1})
    algebra.note_role(m, weight, PRODUCER, {1 if transposed else 0})
    layers = {next(iter(varying(layer))): layer.flatten() for layer in weight.layers if len(varying(layer)) == 1}
    first, second = layers.get(0), layers.get(1)
    if transposed or first is None or (second is None and w.shape[1] > 1):
        for layer in weight.layers:
            m.findings.pin(layer, f"the weight of a grouped convolution is computed ({m.where})")
        if seen is not None:
            m.findings.pin(seen, f"the weight of a grouped convolution is computed ({m.where})")
        return ()
    rows = first.view(groups, -1)
    if second is None:  # depthwise
        m.findings.edge(seen if seen is not None else rows[:, :1], rows, m.where)
        columns = None
    else:
        m.findings.slices.append((rows, m.where))
        columns = second.view(1, -1)
        if seen is not None:
            m.findings.edge(columns, seen, m.where)
    if seen is None and not free:
        m.findings.pin(rows if columns is None else columns, f"it reads an input or a constant ({m.where})")
    return (first.reshape([1, -1, *[1] * spatial]),)


def _by_group(axis: Axis, groups: int) -> Tensor:
    return axis.labels().reshape(groups, -1)


def _one_input_a_group(
    op: Operation, first: Axis, second: Axis | None, groups: int, seen: Tensor | None, free: bool
) -> Axis | None:
    """Depthwise, with one or more outputs an input: they stand and fall with it."""
    findings, where = op.labels.findings, op.labels.where
    base = _by_group(first, groups)
    if second is None and len(first.labels().flatten()) != groups and op.argument("transposed", False):
        findings.pin(base, f"one output channel for each group ({where})")  # transposed, several inputs an output
        return None
    first.roles.add(CHANNELWISE)
    rows = second or first
    if second is not None:
        second.roles.add(CHANNELWISE)
        findings.edge(base, _by_group(second, groups), where)
    if seen is not None:
        findings.edge(seen, base, where)
    elif not free:
        findings.pin(base, f"it reads an input or a constant ({where})")
        return None
    if base.shape[1] > 1:  # several outputs of one input: one neuron
        findings.edge(base[:, :1], base, where)
    return rows


def _blocks(
    op: Operation, first: Axis, second: Axis, groups: int, transposed: bool, seen: Tensor | None, free: bool
) -> Axis:
    """Each group of outputs reads its group of inputs: equally many of each must stay."""
    findings, where = op.labels.findings, op.labels.where
    rows, columns = (second, first) if transposed else (first, second)
    columns.roles.add(CONSUMER)
    rows.roles.add(PRODUCER)
    findings.slices += [(_by_group(columns, groups), where), (_by_group(rows, groups), where)]
    if seen is not None:
        findings.edge(seen, _by_group(columns, groups), where)
    elif not free:
        findings.pin(_by_group(columns, groups), f"it reads an input or a constant ({where})")
    return rows
