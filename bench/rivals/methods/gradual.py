"""Gradual magnitude pruning: channels of least norm go at events whose budgets follow a cubic.

Source: Zhu & Gupta 2017 (arXiv 1710.01878), there for single weights. They prune while the learning rate is still high
and train on after it; so does this, from 10 to 40 % of the training. Cut by flatprune, which keeps the optimizer's
state: what is left of our method without its score, its update of the survivors and its flatness term. The knob is the
norm.
"""

from __future__ import annotations

import flatprune
from bench.rivals.method import Knob, Method
from bench.rivals.training import Training


class Gradual(Method):
    """L1 norms, the same fraction of each layer (Li et al. 2017, arXiv 1608.08710), or ranked over all layers."""

    title = "gradual magnitude"
    source = "Zhu & Gupta 2017, arXiv 1710.01878"
    knob = Knob("norm", "l1_uniform", ("l1", "l2"))

    def begin(self, run: Training) -> None:
        """A pruner without curvature of any use to it."""
        self.pruning = flatprune.PruneWhileTraining(
            run.model,
            run.optimizer,
            run.goal.example,
            target=flatprune.Target(**{run.goal.unit: run.goal.fraction}),
            total_steps=run.total_steps,
            flatness=False,
            criterion=str(self.value),
            seed=run.seed,
        )

    def after_step(self, run: Training) -> None:
        """Channels go now and then."""
        self.pruning.step()

    def finish(self, run: Training) -> None:
        """Take the hooks off."""
        self.pruning.close()


METHODS = {"gradual": Gradual}
