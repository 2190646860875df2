"""Torch-Pruning with sparse training: GroupNormPruner and BNScalePruner.

Source: Fang et al. 2023 (DepGraph, arXiv 2301.12900) and, for the scales of batch norms, Liu et al. 2017 (network
slimming, arXiv 1708.06519); torch-pruning 1.6.1, reproduce/main.py with `--method group_sl --reg 5e-4 --global-pruning`
and `--method slim --reg 1e-5 --global-pruning`, the command lines of its reproduce/readme.md for CIFAR-10. `regularize`
runs between backward and step of every step before the cut, without weight decay; then a progressive cut, then
fine-tuning at a tenth of the learning rate. The authors train 200 epochs dense, 100 sparse and 100 after the cut;
shared out here: half sparse from the start, half after it. The knob is `reg`, to larger values, as there are fewer
steps for it.
"""

from __future__ import annotations

from typing import Any, ClassVar

from bench.rivals.cuts import MakePruner, cut_to_goal, maker
from bench.rivals.method import Knob, Method, two_cosines
from bench.rivals.training import Training


class Sparse(Method):
    """Half the epochs with a regulariser, one cut, the rest."""

    package, distribution = "torch_pruning", "torch-pruning"
    pruner: ClassVar[str]

    def importance(self, tp: Any) -> Any:
        """The criterion that goes with the pruner."""
        raise NotImplementedError

    def rate(self, progress: float) -> float:
        """A cosine each."""
        return two_cosines(progress, 0.5, 0.1)

    def begin(self, run: Training) -> None:
        """The pruner that regularises, and an optimizer without weight decay."""
        self.cut_at = run.total_steps // 2
        self.regularizer = self._make(run)(run.model, 1.0, 1)
        run.renew_optimizer(weight_decay=0.0)

    def before_step(self, run: Training) -> None:
        """Its line in the user's loop."""
        if run.step < self.cut_at:
            self.regularizer.regularize(run.model)

    def after_step(self, run: Training) -> None:
        """Cut once."""
        if run.step == self.cut_at:
            cut_to_goal(run, self._make(run))

    def _make(self, run: Training) -> MakePruner:
        import torch_pruning as tp

        return maker(run, self.pruner, self.importance(tp), reg=float(self.value))


class GroupNorm(Sparse):
    """Norms of coupled groups, the weaker ones regularised more."""

    title = "Torch-Pruning, GroupNorm, sparse training"
    source = "Fang et al. 2023, arXiv 2301.12900; reproduce/main.py --method group_sl"
    pruner = "GroupNormPruner"
    knob = Knob("reg", 5e-4, (5e-3, 2e-2))

    def importance(self, tp: Any) -> Any:
        """Normalised by the largest, as the authors do on CIFAR."""
        return tp.importance.GroupMagnitudeImportance(p=2, normalizer="max")


class BNScale(Sparse):
    """L1 on the scales of batch norms."""

    title = "Torch-Pruning, BNScale, sparse training"
    source = "Liu et al. 2017, arXiv 1708.06519; reproduce/main.py --method slim"
    pruner = "BNScalePruner"
    knob = Knob("reg", 1e-5, (1e-4, 1e-3))

    def importance(self, tp: Any) -> Any:
        """The scales themselves."""
        return tp.importance.BNScaleImportance()


METHODS = {"tp-group-norm": GroupNorm, "tp-bn-scale": BNScale}
