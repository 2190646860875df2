"""Losses whose Fisher information is known: what of a prediction is drawn, and the gradient that follows.

A *prediction* is the model's output as a loss reads it: samples first, classes (where there are any) second. With the
mean loss L = 1/D sum of l over D terms (docs/losses.md has D of each), G = 1/D sum of g g^T, g the gradient of
D L: that of the sum of the terms.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from kfac_ext.curvature.draws import Draws


class Loss(ABC):
    """What curvature knows of a loss; `Curvature.loss` is one.

    Attributes:
        name: as in `Curvature(loss=...)`.
        reduction: of the loss that the user backpropagates, "mean" or "sum".
        needs_output: False: nothing of the model's output is read.
        has_classes: whether one dimension of the output holds classes that exclude each other.
        activation: what makes probabilities of its predictions, where these are logits: "sigmoid" or "softmax".
        inverse: of that, in words of torch.
    """

    name: str
    needs_output = True
    has_classes = False
    activation = inverse = ""

    def __init__(self, reduction: str = "mean") -> None:
        self.reduction = reduction

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, reduction={self.reduction!r})"

    def check(self, prediction: Tensor) -> None:
        """Raise ValueError for a prediction of a shape that the loss does not read."""
        if prediction.dim() < 1 or not prediction.is_floating_point():
            raise ValueError(
                f"Curvature: output {tuple(prediction.shape)} of {prediction.dtype}, expected floating point [N, ...] "
                f"for {self.name}"
            )

    def are_probabilities(self, values: Tensor) -> bool:
        """Whether values in the place of a prediction could be what its activation makes of one."""
        del values
        return False

    def terms(self, prediction: Tensor) -> int:
        """How many terms a prediction has."""
        return prediction.numel()

    def counted_terms(self, prediction: Tensor, counted: Tensor | None) -> int:
        """D, how many terms the mean loss is a mean of."""
        return self.terms(prediction) if counted is None else int(counted.sum())

    def elements(self, prediction: Tensor) -> int:
        """What torch's mean divides the sum over everything by."""
        return self.terms(prediction)

    def ignored(self, prediction: Tensor, gradient: Tensor) -> Tensor | None:
        """Which terms the user's loss leaves out, by its gradient; None: none, or that cannot be told."""
        del prediction, gradient
        return None

    def drawn_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of what is drawn for a prediction of this shape."""
        return torch.Size((shape[0], *shape[2:])) if self.has_classes else shape

    def over_terms(self, mask: Tensor) -> Tensor:
        """A mask of terms in a shape that multiplies a prediction."""
        return mask

    def positions(self, mask: Tensor) -> list[Tensor]:
        """A mask of terms of each output as [N, P] over its positions, true where one of their terms is."""
        return [mask.flatten(2).any(dim=1) if mask.dim() > 2 else mask.flatten(1).any(dim=1, keepdim=True)]

    @abstractmethod
    def draw(self, prediction: Tensor, draws: Draws) -> Tensor:
        """Labels or values drawn from the model's own prediction."""

    @abstractmethod
    def gradient(self, prediction: Tensor, targets: Tensor, counted: Tensor | None = None) -> Tensor:
        """d(sum of the terms)/d(prediction) for these targets; only `counted` terms have one."""

    @abstractmethod
    def variance(self, prediction: Tensor, change: Tensor) -> Tensor:
        """1/D sum of t^T H t, t = `change` of the prediction and H the Hessian of the terms there."""

    @abstractmethod
    def divergence(self, before: Tensor, after: Tensor) -> Tensor:
        """The expected rise of the mean loss from one prediction to another, if labels are drawn from the first."""


def plain(prediction: Tensor) -> Tensor:
    """Detached, float32 or float64."""
    return prediction.detach().to(torch.float64 if prediction.dtype == torch.float64 else torch.float32)
