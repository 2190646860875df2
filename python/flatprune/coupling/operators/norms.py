"""Normalisation by a batch, a layer or groups of channels."""

from __future__ import annotations

from torch import Tensor

from flatprune.coupling import algebra
from flatprune.coupling.operators.pointwise import along_channels
from flatprune.coupling.operators.table import Operation, rule
from flatprune.coupling.values import Value, labels_of, varying


@rule(
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
    "_native_batch_norm_legit_functional cudnn_batch_norm _batch_norm_with_update _batch_norm_no_update batch_norm "
    "miopen_batch_norm instance_norm"
)
def batch_norm(op: Operation) -> list[Value]:
    """Each channel by itself; its vectors and running statistics go with it.

    Labels over positions alone (of a weight that is standardised) leave statistics over the survivors.
    """
    value = op.value()
    positions = set(range(2, value.rank))
    over = tuple(layer for layer in value.layers if varying(layer) and varying(layer) <= positions)
    _note(op, value.having(layers=over), positions)
    rest = tuple(layer for layer in value.layers if not any(layer is other for other in over))
    value = algebra.collapsed(op.labels, value.having(layers=rest), positions)
    value = value.having(layers=(*value.layers, *over))
    vectors = along_channels(op, list(op.args[1:5]), value.rank)
    return [algebra.combine(op.labels, [value, *vectors], value.size)]


@rule("native_layer_norm _fused_rms_norm rms_norm layer_norm _fused_layer_norm")
def layer_norm(op: Operation) -> list[Value]:
    """Statistics over the last dimensions: over the survivors after a cut."""
    value, shape = op.value(), op.args[1]
    _note(op, value, set(range(value.rank - len(shape), value.rank)))
    vectors = [op.value_of(t) for t in op.args[2:4] if isinstance(t, Tensor)]
    return [algebra.combine(op.labels, [value, *vectors], value.size)]


@rule("native_group_norm")
def group_norm(op: Operation) -> list[Value]:
    """Statistics over groups of channels, of which as many must stay in each."""
    value, groups = op.value(), op.argument("group")
    value = algebra.collapsed(op.labels, value, range(2, value.rank))
    if groups < value.size[1]:
        _note(op, value, {1})
        for layer in value.layers:
            if varying(layer) == {1}:
                op.labels.findings.slices.append((layer.reshape(groups, -1), op.labels.where))
    return [algebra.combine(op.labels, [value, *along_channels(op, list(op.args[1:3]), value.rank)], value.size)]


def _note(op: Operation, value: Value, dims: set[int]) -> None:
    for layer in value.layers:
        if varying(layer) & dims:
            op.labels.findings.joint_norms.append((labels_of(layer), op.labels.where))


@rule("_weight_norm_interface")
def weight_norm(op: Operation) -> list[Value]:
    """g v / |v|, the norm over all dimensions but one: over the survivors after a cut."""
    direction, scale = op.value(0), op.value(1)
    kept = op.argument("dim", 0) % direction.rank
    _note(op, direction, set(range(direction.rank)) - {kept})
    return [algebra.combine(op.labels, [direction, scale], direction.size), Value(tuple(op.outputs[1].shape))]
