"""Torch-Pruning, magnitudes: one cut with fine-tuning, and in steps while the network trains.

Source: Fang et al. 2023 (DepGraph, arXiv 2301.12900), torch-pruning 1.6.1. One shot is the recipe of its
reproduce/main.py with `--method group_norm --global-pruning` (the authors' criterion without sparse learning: group L2
norms, divided by their mean): dense training, one progressive cut to the size, fine-tuning at a tenth of the learning
rate. Its epochs are shared out here: half dense, half fine-tuning. The knob is that tenth; Renda et al. 2020
(arXiv 2003.02389) restart from the full rate. In steps is its README's `iterative_steps`, ratios of channels rising
linearly, from 10 to 40 % of the training. The library leaves the optimizer to the user: each cut gets a new one.
"""

from __future__ import annotations

import copy

from bench.rivals.cuts import MakePruner, cut_by, cut_to_goal, maker
from bench.rivals.method import Knob, Method, two_cosines
from bench.rivals.sizes import bisected
from bench.rivals.training import Training

EVENTS = 10
START, END = 0.1, 0.4


class OneShot(Method):
    """Half the epochs dense, one cut, the rest."""

    title = "Torch-Pruning, magnitude, one shot"
    source = "Fang et al. 2023, arXiv 2301.12900; reproduce/main.py --method group_norm"
    package, distribution = "torch_pruning", "torch-pruning"
    knob = Knob("fine-tuning lr, of the first", 0.1, (0.3, 1.0))

    def rate(self, progress: float) -> float:
        """A cosine each."""
        return two_cosines(progress, 0.5, float(self.value))

    def begin(self, run: Training) -> None:
        """When to cut."""
        self.cut_at = run.total_steps // 2

    def after_step(self, run: Training) -> None:
        """Cut once."""
        if run.step == self.cut_at:
            cut_to_goal(run, _maker(run))


class Progressive(Method):
    """Ten cuts while the network trains."""

    title = "Torch-Pruning, magnitude, while training"
    source = "Fang et al. 2023, arXiv 2301.12900; README, iterative_steps"
    package, distribution = "torch_pruning", "torch-pruning"

    def begin(self, run: Training) -> None:
        """When to cut."""
        first, last = START * run.total_steps, END * run.total_steps
        self.events = [round(first + (last - first) * (i + 1) / EVENTS) for i in range(EVENTS)]

    def after_step(self, run: Training) -> None:
        """Cut a part of the channels; how many have to go in all is found anew at every event."""
        if run.step not in self.events:
            return
        left, make = EVENTS - self.events.index(run.step), _maker(run)

        def cost(ratio: float) -> int:
            return run.goal.cost(cut_by(ratio, copy.deepcopy(run.model), make))

        with run.uncounted():
            ratio = bisected(cost, 0.0, 1.0, run.target_cost, steps=12)
        cut_by(ratio / left, run.model, make)
        run.renew_optimizer()


def _maker(run: Training) -> MakePruner:
    import torch_pruning as tp

    return maker(run, "MagnitudePruner", tp.importance.GroupMagnitudeImportance(p=2))


METHODS = {"tp-one-shot": OneShot, "tp-progressive": Progressive}
