"""The method's own criteria: a neuron is judged by the layers that read it (see `flatprune.criteria.saliency`)."""

from __future__ import annotations

from flatprune.criteria.base import Criterion, Evidence, Scores
from flatprune.criteria.joint import JointObs, JointOutgoing
from flatprune.criteria.saliency import curvature_scores
from flatprune.cutting.neurons import CONSUMER

_OBS = "Hassibi & Stork 1993 for a block of columns, with the Kronecker factors of Martens & Grosse 2015; ours"


def obs_scores(evidence: Evidence) -> Scores:
    """S_j = 1/2 tr(V_J^T G V_J (H_JJ)^-1), H = (A + D)^-1, summed over the layers that read neuron j."""
    statistics, inverses = evidence.statistics(CONSUMER), evidence.inverses(CONSUMER)
    return curvature_scores(evidence.curvature, evidence.groups, "obs", statistics, inverses)


def outgoing_scores(evidence: Evidence) -> Scores:
    """S_j = 1/2 tr(V_J^T G V_J A_JJ), summed over the layers that read neuron j."""
    return curvature_scores(evidence.curvature, evidence.groups, "outgoing", evidence.statistics(CONSUMER))


OUTGOING = Criterion(
    "outgoing",
    outgoing_scores,
    source="optimal brain damage (LeCun et al. 1990) for a block of columns, with Kronecker factors; ours",
    needs=("factors",),
    per_cost=True,
    predicts_loss=True,
    compensates="method",
    joint=JointOutgoing,
)
OBS = Criterion(
    "obs",
    obs_scores,
    source=_OBS,
    needs=("factors", "inverses"),
    per_cost=True,
    predicts_loss=True,
    compensates="method",
    uncompensated=OUTGOING,
    joint=JointObs,
    greedy=True,
)
