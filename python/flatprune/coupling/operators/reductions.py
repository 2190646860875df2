"""Sums and statistics over dimensions."""

from __future__ import annotations

from flatprune.coupling import algebra
from flatprune.coupling.operators.table import Operation, rule
from flatprune.coupling.values import Value

STATISTICS = (
    "mean amax amin aminmax max min var std var_mean std_mean norm linalg_vector_norm prod logsumexp argmax argmin "
    "median nanmedian"
)


def reduced_dims(op: Operation, rank: int) -> list[int]:
    """The dimensions an operator reduces; all without an argument."""
    dims = op.argument("dim")
    if dims is None or dims == []:
        return list(range(rank))
    return [dims] if isinstance(dims, int) else list(dims)


def _reduce(op: Operation, *, statistic: bool) -> list[Value]:
    if len(op.tensors) > 1 and op.name in ("max", "min"):  # elementwise
        return [algebra.combine(op.labels, [op.value_of(t) for t in op.tensors], op.shape)]
    value = op.value()
    keep = bool(op.argument("keepdim", False))
    result = algebra.reduce(op.labels, value, reduced_dims(op, value.rank), keep=keep, statistic=statistic)
    return [result] * len(op.outputs)


@rule("sum nansum any all count_nonzero _is_all_true _is_any_true")
def total(op: Operation) -> list[Value]:
    """What goes leaves a smaller sum: nothing else changes."""
    return _reduce(op, statistic=False)


@rule(STATISTICS)
def statistic(op: Operation) -> list[Value]:
    """What goes changes the statistic, which is right only in a norm over these channels."""
    return _reduce(op, statistic=True)
