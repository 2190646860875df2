"""Gradual magnitude pruning: channels of least norm go at events whose budgets follow a cubic.

Source: Zhu & Gupta 2017 (arXiv 1710.01878), there for single weights. They prune while the learning rate is still high
and train on after it; so does this, from 10 to 40 % of the training. Cut by flatprune, which keeps the optimizer's
state: what is left of our method without its score, its update of the survivors and its flatness term. The knob is the
norm.
"""

from __future__ import annotations

from typing import Any

from bench.rivals.method import Knob
from bench.rivals.methods.ours import OursWithoutFlatness
from bench.rivals.training import Training


class Gradual(OursWithoutFlatness):
    """L1 norms, the same fraction of each layer (Li et al. 2017, arXiv 1608.08710), or ranked over all layers."""

    title = "gradual magnitude"
    source = "Zhu & Gupta 2017, arXiv 1710.01878"
    knob = Knob("norm", "l1_uniform", ("l1", "l2"))

    def options(self, run: Training) -> dict[str, Any]:
        """Norms in the place of our score."""
        return {**super().options(run), "criterion": str(self.value)}


METHODS = {"gradual": Gradual}
