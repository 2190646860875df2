"""The method's own criteria: a neuron is judged by the layers that read it (see `flatprune.criteria.saliency`)."""

from __future__ import annotations

from flatprune.criteria.base import Criterion, Scores, ScoringContext
from flatprune.criteria.joint import JointObd, JointObs
from flatprune.criteria.saliency import curvature_scores
from flatprune.cutting.neurons import CONSUMER

_OBS = "Hassibi & Stork 1992 for a block of columns, with the Kronecker factors of Martens & Grosse 2015; ours"


def obs_scores(context: ScoringContext) -> Scores:
    """S_j = 1/2 tr(V_J^T G V_J (H_JJ)^-1), H = (A + D)^-1, summed over the layers that read neuron j."""
    statistics, inverses = context.statistics(CONSUMER), context.inverses(CONSUMER)
    return curvature_scores(context.curvature, context.groups, "obs", statistics, inverses)


def obd_scores(context: ScoringContext) -> Scores:
    """S_j = 1/2 tr(V_J^T G V_J A_JJ), summed over the layers that read neuron j."""
    return curvature_scores(context.curvature, context.groups, "obd", context.statistics(CONSUMER))


OBD = Criterion(
    "obd",
    obd_scores,
    source="optimal brain damage (LeCun et al. 1990) for a block of columns, with Kronecker factors; ours",
    needs=("factors",),
    per_cost=True,
    predicts_loss=True,
    compensates="method",
    joint=JointObd,
)
OBS = Criterion(
    "obs",
    obs_scores,
    source=_OBS,
    needs=("factors", "inverses"),
    per_cost=True,
    predicts_loss=True,
    compensates="method",
    uncompensated=OBD,
    joint=JointObs,
    greedy=True,
)
