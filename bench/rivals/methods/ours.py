"""Ours, `flatprune.PruneWhileTraining`, as the README has it: with all defaults, and without the flatness term.

Source: docs/method.md. The defaults prune from 10 to 40 % of the training; the learning rate is constant until then.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

import flatprune
from bench.rivals.method import Method
from bench.rivals.training import Training


class Ours(Method):
    """All defaults."""

    title = "ours"
    source = "flatprune, docs/method.md"
    flatness: ClassVar[bool] = True

    def options(self, run: Training) -> dict[str, Any]:
        """What is not a default."""
        generator = torch.Generator().manual_seed(run.seed)
        return {"flatness": self.flatness, "curvature": {"generator": generator}}

    def begin(self, run: Training) -> None:
        """Around the model and optimizer that are there."""
        self.pruning = flatprune.PruneWhileTraining(
            run.model,
            run.optimizer,
            run.goal.example,
            target=flatprune.Target(**{run.goal.unit: run.goal.fraction}),
            total_steps=run.total_steps,
            seed=run.seed,
            **self.options(run),
        )

    def loss(self, run: Training, x: Tensor, outputs: Tensor, loss: Tensor) -> Tensor:
        """With the flatness term."""
        return self.pruning.loss(x, outputs, loss)

    def after_step(self, run: Training) -> None:
        """Neurons go now and then."""
        self.pruning.step()

    def finish(self, run: Training) -> None:
        """Keep what a network of the same shape is made of."""
        run.attributes = self.pruning.state_dict()["attributes"]
        self.pruning.close()


class OursWithoutFlatness(Ours):
    """`flatness=False`."""

    title = "ours, no flatness"
    flatness = False


METHODS = {"ours": Ours, "ours-no-flatness": OursWithoutFlatness}
