"""The table of operators: what each class of ATen operator does to labels.

A rule is a function from an `Operation` to the value of its output, or a list of values of its outputs. Elementwise
operators that are not in the table are known by `torch.Tag.pointwise`; of all others that labels reach, the neurons
behind them are refused, naming operator and module.
"""

from __future__ import annotations

from flatprune.coupling.operators import contractions, indexing, movement, norms, pointwise, reductions  # noqa: F401
from flatprune.coupling.operators.table import RULES, Operation, fallback, rule

__all__ = ["RULES", "Operation", "fallback", "rule"]
