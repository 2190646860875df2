"""Which neurons are worth least: every criterion behind one interface, by name.

`Criterion` is a function from `ScoringContext` (weights, factors, gradients, recent inputs) to scores, with what
belongs to it. `Pruner(criterion=...)` takes a name of `CRITERIA`, a `Criterion` of your own, or a plain function.
"""

from __future__ import annotations

from collections.abc import Callable

from flatprune.criteria.base import Criterion, Scores, ScoringContext
from flatprune.criteria.game import BANZHAF, SHAPLEY, banzhaf, shapley
from flatprune.criteria.gradient import GATE_FISHER, TAYLOR
from flatprune.criteria.kronecker import C_OBD, C_OBS, KRON_OBD, KRON_OBS
from flatprune.criteria.magnitude import BN_SCALE, FPGM, L1, L1_UNIFORM, L2, L2_UNIFORM, RANDOM
from flatprune.criteria.optimal_brain import OBD, OBS

__all__ = ["CRITERIA", "Criterion", "Scores", "ScoringContext", "as_criterion", "banzhaf", "shapley"]

CRITERIA = {
    criterion.name: criterion
    for criterion in (
        OBS,
        OBD,
        KRON_OBD,
        KRON_OBS,
        C_OBD,
        C_OBS,
        TAYLOR,
        GATE_FISHER,
        BN_SCALE,
        L1,
        L1_UNIFORM,
        L2,
        L2_UNIFORM,
        FPGM,
        SHAPLEY,
        BANZHAF,
        RANDOM,
    )
}


def as_criterion(given: str | Criterion | Callable[[ScoringContext], Scores]) -> Criterion:
    """The criterion of that name, or made from a function of `ScoringContext`, whose scores are taken as they are.

    Raises:
        ValueError: there is no criterion of that name.
        TypeError: it is neither a name nor a criterion nor a function.
    """
    if isinstance(given, Criterion):
        return given
    if isinstance(given, str):
        if given not in CRITERIA:
            raise ValueError(f"criterion is {given!r}, expected one of {', '.join(CRITERIA)}")
        return CRITERIA[given]
    if callable(given):
        return Criterion(getattr(given, "__name__", type(given).__name__), given)
    raise TypeError(f"criterion is {given!r}, expected a name, a Criterion or a function of ScoringContext")
