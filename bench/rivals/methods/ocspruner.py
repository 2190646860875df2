"""A schedule like OCSPruner's: channels shrink from 10 % of the training, one cut once their choice is stable.

Source: Ghimire et al. (WACV 2026, arXiv 2501.13439); **written here after the paper and its scripts/prune_cifar.sh**,
since its code is no package. Theirs: learning rate 0.1, times 0.2 at 30, 60, 80 and 90 % of 300 epochs; from epoch 30
the channels that would go are chosen anew at every epoch (group norms as in `_importance`, the threshold by bisection
on copies) and their weights multiplied by 1 - reg lr at every step, reg growing by 1e-4 an epoch; stable is a Jaccard
similarity of the kept channels above 0.999 (running mean of three, two epochs apart), at the latest at epoch 110. Ours:
an "epoch" is a 60th of the training, reg grows so that the shrinkage until the latest cut is theirs over 80 epochs of
391 steps, e^-12.6 (the knob: its exponent), no layer loses more than 95 % (theirs 75 %, too few for these sizes), and
the factor for a channel's cost, next to 1 in networks this small, is left out.
"""

from __future__ import annotations

import copy
import math
import statistics
from typing import Any

import torch
from torch import Tensor, nn

from bench.rivals.cuts import all_groups, groups_of, pruned_axis
from bench.rivals.method import Knob, Method, multistep
from bench.rivals.sizes import bisected
from bench.rivals.training import Training

START, LATEST, EPOCHS, STABLE, MOST = 30 / 300, 110 / 300, 60, 0.999, 0.95
Chosen = list[list[int]]  # the channels of each group that go


class OCSPruner(Method):
    """One cut at 10 to 37 % of the training."""

    title = "like OCSPruner"
    source = "Ghimire et al. 2026, arXiv 2501.13439; written here"
    package, distribution = "torch_pruning", "torch-pruning"
    knob = Knob("shrinkage", 12.6, (4.0, 36.0))

    def rate(self, progress: float) -> float:
        """Steps."""
        return multistep(progress, (0.3, 0.6, 0.8, 0.9), 0.2)

    def begin(self, run: Training) -> None:
        """The phase, in steps."""
        self.first, self.last = round(START * run.total_steps), round(LATEST * run.total_steps)
        self.every = max(1, run.total_steps // EPOCHS)
        self.sizes = [len(group[0].idxs) for group in all_groups(run.model, run)]
        self.history: list[Chosen] = []
        self.similarities: list[float] = []
        self.groups: list[Any] = []  # that shrink

    def after_step(self, run: Training) -> None:
        """Shrink what is to go, choose anew, cut once."""
        if not self.first <= run.step <= self.last:
            return
        self._shrink(run.step)
        if (run.step - self.first) % self.every == 0 or run.step == self.last:
            self.history.append(_choose(run))
            self.groups = groups_of(run.model, run, self.history[-1])
            self.similarities.append(self._similarity())
        if statistics.fmean(self.similarities[-3:]) > STABLE or run.step == self.last:
            _cut(run.model, run, self.history[-1])
            run.renew_optimizer()
            self.last = run.step

    def _shrink(self, step: int) -> None:
        steps = self.last - self.first
        factor = math.exp(-float(self.value) * 2 * (step - self.first) / (steps * (steps + 1)))  # the knob, in all
        for group in self.groups:
            for dependency, channels in group:
                axis = pruned_axis(dependency)
                if axis is not None:
                    dependency.target.module.weight.data.movedim(axis, 0)[channels] *= factor

    def _similarity(self) -> float:
        if len(self.history) < 3:
            return 0.0
        pairs = zip(self.history[-3], self.history[-1], self.sizes)
        kept = [(set(range(n)) - set(old), set(range(n)) - set(new)) for old, new, n in pairs]
        return statistics.fmean(len(old & new) / len(old | new) for old, new in kept)


def _choose(run: Training) -> Chosen:
    scores = [_importance(group) for group in all_groups(run.model, run)]
    order = torch.cat(scores).sort().values.tolist()

    def below(place: int) -> Chosen:
        return [_lowest(score, order[place]) for score in scores]

    def cost(place: int) -> int:
        return run.goal.cost(_cut(copy.deepcopy(run.model), run, below(place)))

    return below(bisected(cost, 0, len(order) - 1, run.target_cost))


def _lowest(score: Tensor, threshold: float) -> list[int]:
    return score.argsort()[: min(int((score <= threshold).sum()), int(MOST * len(score)))].tolist()


@torch.no_grad()
def _importance(group: Any) -> Tensor:
    """Squared norm of a channel's weights, over the root of their number, mean over the layers of the group."""
    found = []
    for dependency, channels in group:
        axis = pruned_axis(dependency)
        if axis is not None:
            rows = dependency.target.module.weight.movedim(axis, 0)[channels].reshape(len(group[0].idxs), -1)
            found.append(rows.pow(2).sum(1) / math.sqrt(rows.shape[1]))
    return torch.stack(found).mean(0)


def _cut(model: nn.Module, run: Training, chosen: Chosen) -> nn.Module:
    for group in groups_of(model, run, chosen):
        group.prune()
    return model


METHODS = {"ocspruner": OCSPruner}
