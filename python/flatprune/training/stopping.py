"""Stopping to prune when the network does not stand it any more, judged on images that are held out of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from flatprune.data import Dataset
from flatprune.errors import InputError

VALIDATION_FRACTION = 0.1  # of the training images

Evaluate = Callable[[nn.Module, Tensor, Tensor], tuple[float, float]]


def hold_out(dataset: Dataset, seed: int) -> tuple[Dataset, Tensor, Tensor]:
    """The data set without a random tenth of its training images, and that tenth: images and labels.

    Raises:
        InputError: there are fewer than 20 training images.
    """
    total = len(dataset.x_train)
    count = round(VALIDATION_FRACTION * total)
    if count < 2:
        raise InputError(f"stop_accuracy_drop holds out a tenth of the training images; {total} are too few, need 20")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    held, kept = (index.sort().values.to(dataset.x_train.device) for index in (order[:count], order[count:]))
    rest = replace(dataset, x_train=dataset.x_train[kept], y_train=dataset.y_train[kept])
    return rest, dataset.x_train[held], dataset.y_train[held]


class AccuracyGuard:
    """Says when the accuracy on held-out images has fallen too far below its best.

    Asked before every removal event, so the network has had the steps since the last one to recover.

    Args:
        x, y: images and labels that are not trained on.
        drop: percentage points that the accuracy may fall below the best one seen at an event so far.
        evaluate: (model, x, y) -> accuracy in percent, loss.

    Attributes:
        best: that best accuracy; part of a checkpoint.
    """

    def __init__(self, x: Tensor, y: Tensor, drop: float, evaluate: Evaluate) -> None:
        self.x, self.y, self.drop = x, y, drop
        self.best: float | None = None
        self._evaluate = evaluate

    def objection(self, model: nn.Module) -> str:
        """Why pruning must stop now; empty if it may go on."""
        accuracy, _ = self._evaluate(model, self.x, self.y)
        best = self.best = accuracy if self.best is None else max(self.best, accuracy)
        if best - accuracy <= self.drop:
            return ""
        return (
            f"the accuracy on {len(self.x)} held-out images fell from {best:.2f} % to {accuracy:.2f} %, "
            f"by more than {self.drop:g} points"
        )
