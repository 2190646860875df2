"""Neurons as players of a cooperative game: what they are worth on average over coalitions of the others.

The value of a coalition is minus the divergence D of the network without all other neurons (what reads them sees zero)
from the whole one, on recent inputs: mean KL(p_whole | p_without) for cross entropy, the mean squared difference for
"mse". It is the rise of the mean loss if labels are drawn from the model's own prediction, so no labels are needed.
Source: Diaz-Ortiz et al. 2023, Using cooperative game theory to prune neural networks (GTAP), arXiv 2311.10468.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import functional_call

from flatprune.criteria.base import Criterion, Scores, ScoringContext
from flatprune.criteria.loss_change import divergence
from flatprune.criteria.masking import masked_tensors, survivors_only

_SOURCE = "Diaz-Ortiz et al. 2023, GTAP, arXiv 2311.10468"
_RIDGE = 0.01  # of a mask's variance; a regression with more neurons than samples needs one


def shapley(samples: int = 512) -> Criterion:
    """The criterion of sampled Shapley values.

    S_j = mean over random orders of D(pruned before j, and j) - D(pruned before j): the rise of D when j leaves,
    averaged over who left before (Shapley 1953; sampling by Castro et al. 2009). The values of one order add up to D
    of the empty network.

    Args:
        samples: forward passes at least; they make whole orders, of one pass a neuron each.

    Raises:
        ValueError: `samples` is not positive.
    """
    _check_samples("shapley", samples)

    def score(context: ScoringContext) -> Scores:
        """S_j = mean rise of D when j leaves, over random orders in which the others left before."""
        network = MaskedNetwork(context)
        players = _players(context)
        total = torch.zeros(len(players), dtype=torch.float64)
        orders = -(-samples // len(players))
        for _ in range(orders):
            order = torch.randperm(len(players), generator=context.generator)
            pruned = torch.zeros(len(players), dtype=torch.bool)
            before = 0.0
            for player in order.tolist():
                pruned[player] = True
                after = network.divergence_without(pruned)
                total[player] += after - before
                before = after
        return _by_group(context, total / orders)

    return Criterion("shapley", score, _SOURCE, needs=("forwards",), per_cost=True, predicts_loss=True)


def banzhaf(samples: int = 512, keep: float = 0.9) -> Criterion:
    """The criterion of sampled (weighted) Banzhaf values.

    S_j = E[D(S without j) - D(S with j)], every other neuron in the coalition S with probability `keep`, as in Dropout
    (Banzhaf 1965: 1/2; Li & Yu 2023 for other weights). All values come from the same coalitions: with independent
    members the value is the coefficient of j in the linear regression of D on who is pruned, which is what is computed
    (with a ridge of 0.01 of a mask's variance, which makes all values smaller by a hundredth).

    Args:
        samples: coalitions, one forward pass each.
        keep: how likely a neuron is to be in a coalition; near 1 the values tell of the network as it is.

    Raises:
        ValueError: `samples` is not positive, or `keep` not between 0 and 1.
    """
    _check_samples("banzhaf", samples)
    if not 0.0 < keep < 1.0:
        raise ValueError(f"banzhaf: keep is {keep}, expected above 0 and below 1")

    def score(context: ScoringContext) -> Scores:
        """S_j = E[D(S without j) - D(S with j)], every other neuron in S with probability `keep`."""
        network = MaskedNetwork(context)
        shape = (samples, len(_players(context)))
        pruned = torch.rand(shape, generator=context.generator, dtype=torch.float64) >= keep
        values = torch.tensor([network.divergence_without(row) for row in pruned], dtype=torch.float64)
        return _by_group(context, _regression(pruned.double(), values, keep))

    return Criterion("banzhaf", score, _SOURCE, needs=("forwards",), per_cost=True, predicts_loss=True)


def _regression(pruned: Tensor, values: Tensor, keep: float) -> Tensor:
    """Coefficients [players] of values [samples] on pruned [samples, players], ridge on top."""
    centred = pruned - pruned.mean(dim=0)
    gram = centred.mT @ centred
    gram.diagonal().add_(_RIDGE * keep * (1.0 - keep) * len(values))
    return torch.linalg.solve(gram, centred.mT @ (values - values.mean()))


class MaskedNetwork:
    """D of the network without some neurons from the whole one, on the recent inputs.

    Args:
        context: of the network as it is.
    """

    def __init__(self, context: ScoringContext) -> None:
        self._context = context
        self._calls = context.recent_calls()
        self._whole = self._output({})

    @torch.no_grad()
    def divergence_without(self, pruned: Tensor) -> float:
        """D without the neurons marked in `pruned`, bool [neurons of all groups, group after group]."""
        parts = pruned.split([group.width for group in self._context.groups])
        indices = {position: part.nonzero().flatten() for position, part in enumerate(parts) if bool(part.any())}
        return divergence(self._whole, self._output(indices), self._context.curvature.loss)

    @torch.no_grad()
    def _output(self, pruned: Mapping[int, Tensor]) -> list[Tensor]:
        model, groups = self._context.model, self._context.groups
        masked = masked_tensors(dict(model.named_parameters(remove_duplicate=False)), groups, pruned)
        with self._context.probing(), survivors_only(model, groups, pruned):
            outputs = [
                call.run(lambda *args, **kwargs: functional_call(model, masked, args, kwargs, tie_weights=False))
                for call in self._calls
            ]
        return [self._context.curvature.reading.read(output) for output in outputs]


def _players(context: ScoringContext) -> range:
    return range(sum(group.width for group in context.groups))


def _by_group(context: ScoringContext, values: Tensor) -> Scores:
    return list(values.split([group.width for group in context.groups]))


def _check_samples(name: str, samples: int) -> None:
    if samples < 1:
        raise ValueError(f"{name}: samples is {samples}, expected 1 or more")


SHAPLEY = shapley()
BANZHAF = banzhaf()
