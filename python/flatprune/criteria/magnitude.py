"""Criteria that look at weights alone.

A neuron that several layers produce, or several rows of one, has the mean over all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from flatprune.coupling import CHANNELWISE, PRODUCER, Member, NeuronGroup
from flatprune.criteria.base import Criterion, Scores, ScoringContext, mean_over_producers, ranks


def l1_scores(context: ScoringContext) -> Scores:
    """S_j = mean |w| over the weights of the rows that make neuron j."""
    return [mean_over_producers(context, group, lambda rows: rows.abs().mean(dim=1)) for group in context.groups]


def l2_scores(context: ScoringContext) -> Scores:
    """S_j = (mean w^2)^(1/2) over the weights of the rows that make neuron j: |w|_2 by the root of their number."""
    return [
        mean_over_producers(context, group, lambda rows: rows.square().mean(dim=1)).sqrt() for group in context.groups
    ]


def uniform(score: Callable[[ScoringContext], Scores]) -> Callable[[ScoringContext], Scores]:
    """The same order within each layer, but every layer loses the same fraction: rank / width."""

    def ranked(context: ScoringContext) -> Scores:
        """S_j = rank / width by another score: its order, but every layer loses the same fraction."""
        return ranks(score(context))

    return ranked


def median_distances(context: ScoringContext) -> Scores:
    """S_j = rank / width of sum over k of |w_j - w_k|_2, w_j the filter of neuron j.

    The filter nearest to all others (to the geometric median) goes first. Distances of layers of different size cannot
    be compared, and the paper takes the same fraction of each: hence the rank. Rows of several producers are one long
    filter.
    """
    return ranks([_distances(context, group) for group in context.groups])


def _distances(context: ScoringContext, group: NeuronGroup) -> Tensor:
    parts = [context.rows(member).double().cpu()[member.index].flatten(1) for member in group.of_role(PRODUCER)]
    filters = torch.cat(parts, dim=1)
    return torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist").sum(dim=1)


def norm_scales(context: ScoringContext) -> Scores:
    """S_j = mean |gamma| over the entries of all batch norms that belong to neuron j."""
    check_norms(context)
    scores = []
    for group in context.groups:
        gammas = [
            context.tensor(member).detach().abs().cpu().double()[member.index].mean(dim=1)
            for member in _norms(context, group)
        ]
        scores.append(torch.stack(gammas).mean(dim=0))
    return scores


def check_norms(context: ScoringContext) -> None:
    """Raise ValueError, naming the layer, for neurons without a norm that scales them."""
    for group in context.groups:
        if not _norms(context, group):
            raise ValueError(
                f"criterion bn_scale: no norm with a scale (gamma) follows layer {group.name!r}; choose another "
                "criterion, or exclude the layer"
            )


def _norms(context: ScoringContext, group: NeuronGroup) -> list[Member]:
    """The scales of norms that treat each channel by itself."""
    modules = dict(context.model.named_modules())
    return [
        member
        for member in group.of_role(CHANNELWISE)
        if member.name.endswith("weight") and isinstance(modules[member.module], _NormBase)
    ]


def random_scores(context: ScoringContext) -> Scores:
    """S_j ~ U(0, 1), drawn anew at every event from seed and step."""
    return [torch.rand(group.width, generator=context.generator, dtype=torch.float64) for group in context.groups]


_FILTERS = "Li et al. 2017, Pruning filters for efficient convnets, arXiv 1608.08710"
L1 = Criterion("l1", l1_scores, source=_FILTERS)
L1_UNIFORM = Criterion("l1_uniform", uniform(l1_scores), source=_FILTERS)
L2 = Criterion("l2", l2_scores, source=_FILTERS)
L2_UNIFORM = Criterion("l2_uniform", uniform(l2_scores), source=_FILTERS)
FPGM = Criterion("fpgm", median_distances, source="He et al. 2019, geometric median, arXiv 1811.00250")
BN_SCALE = Criterion(
    "bn_scale", norm_scales, source="Liu et al. 2017, network slimming, arXiv 1708.06519", check=check_norms
)
RANDOM = Criterion("random", random_scores, source="Mittal et al. 2018, arXiv 1801.10447")
