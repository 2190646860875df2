"""Losses of labels: cross entropy over classes that exclude each other, binary cross entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_ext.curvature.draws import Draws
from kfac_ext.curvature.loss import Loss, plain
from kfac_ext.curvature.modes import reading_is_free


class CrossEntropy(Loss):
    """Cross entropy of logits (or log-probabilities) [N, C, ...]; each label is a term.

    Args:
        reduction: "mean" or "sum".
        weight: of each class, [C]; a mean divides by the weights of the labels.
    """

    name, has_classes = "cross_entropy", True
    activation, inverse = "softmax", "torch.log"

    def __init__(self, reduction: str = "mean", weight: Tensor | None = None) -> None:
        super().__init__(reduction)
        self.weight = weight

    def check(self, prediction: Tensor) -> None:
        """Raise ValueError for less than two classes."""
        if prediction.dim() < 2 or prediction.shape[1] < 2:
            raise ValueError(
                f"Curvature: output {tuple(prediction.shape)}, expected [N, classes >= 2, ...] for cross_entropy "
                "(loss='bce' takes one logit)"
            )
        super().check(prediction)

    def are_probabilities(self, values: Tensor) -> bool:
        """Whether none is negative and those of all classes add up to 1, as far as their dtype can tell."""
        tolerance = 8 * values.shape[1] ** 0.5 * torch.finfo(values.dtype).eps
        return bool((values >= 0).all()) and bool(((values.sum(dim=1) - 1).abs() <= tolerance).all())

    def terms(self, prediction: Tensor) -> int:
        """N times the positions."""
        return prediction.numel() // prediction.shape[1]

    def ignored(self, prediction: Tensor, gradient: Tensor) -> Tensor | None:
        """Where the gradient is zero, and not because the prediction is certain: [N, ...]."""
        zero = ~gradient.any(dim=1)
        if reading_is_free(zero.device) and not bool(zero.any()):
            return None
        return zero & (prediction.softmax(dim=1).amax(dim=1) < 1)

    def over_terms(self, mask: Tensor) -> Tensor:
        """[N, 1, ...]."""
        return mask.unsqueeze(1)

    def positions(self, mask: Tensor) -> list[Tensor]:
        """Every term is a position."""
        return [mask.flatten(1) if mask.dim() > 1 else mask[:, None]]

    def draw(self, prediction: Tensor, draws: Draws) -> Tensor:
        """Labels [N, ...]."""
        cumulative = plain(prediction).softmax(dim=1).movedim(1, -1).cumsum(dim=-1)
        draw = draws.uniform((*cumulative.shape[:-1], 1), cumulative)
        return (cumulative < draw).sum(dim=-1).clamp_max(prediction.shape[1] - 1)

    def gradient(self, prediction: Tensor, targets: Tensor, counted: Tensor | None = None) -> Tensor:
        """Softmax - onehot, times the label's weight."""
        onehot = torch.zeros_like(prediction).scatter_(1, targets.unsqueeze(1), 1.0)
        difference = prediction.softmax(dim=1) - onehot
        if self.weight is None:
            return difference if counted is None else difference * self.over_terms(counted)
        weights = self.weight.to(prediction)[targets]
        weights = weights if counted is None else weights * counted
        if self.reduction == "mean":
            count = weights.numel() if counted is None else counted.sum()
            weights = weights * (count / weights.sum())
        return difference * weights.unsqueeze(1)

    def variance(self, prediction: Tensor, change: Tensor) -> Tensor:
        """mean[sum_c p t^2 - (sum_c p t)^2], p the softmax."""
        p = prediction.softmax(dim=1)
        mean = (p * change).sum(dim=1, keepdim=True)
        return (p * (change - mean).square()).sum(dim=1).mean()

    def divergence(self, before: Tensor, after: Tensor) -> Tensor:
        """Mean KL(softmax before || softmax after)."""
        log_p = before.log_softmax(dim=1)
        return (log_p.exp() * (log_p - after.log_softmax(dim=1))).sum(dim=1).mean()


class BinaryCrossEntropy(Loss):
    """Binary cross entropy of logits, [N], [N, 1] or many labels [N, L, ...]; each logit is a term of its own.

    Args:
        reduction: "mean" or "sum".
        weight: of each term, or what broadcasts to the prediction.
        pos_weight: of positive labels.
    """

    name = "bce"
    activation, inverse = "sigmoid", "torch.logit"

    def __init__(self, reduction: str = "mean", weight: Tensor | None = None, pos_weight: Tensor | None = None) -> None:
        super().__init__(reduction)
        self.weight, self.pos_weight = weight, pos_weight

    def are_probabilities(self, values: Tensor) -> bool:
        """Whether all lie from 0 to 1."""
        return bool(((values >= 0) & (values <= 1)).all())

    def ignored(self, prediction: Tensor, gradient: Tensor) -> Tensor | None:
        """Where the gradient is zero though the prediction is not certain."""
        zero = gradient == 0
        if reading_is_free(zero.device) and not bool(zero.any()):
            return None
        p = prediction.sigmoid()
        return zero & (p > 0) & (p < 1)

    def draw(self, prediction: Tensor, draws: Draws) -> Tensor:
        """0 or 1 for each logit."""
        p = plain(prediction).sigmoid()
        return (draws.uniform(p.shape, p) < p).to(p.dtype)

    def gradient(self, prediction: Tensor, targets: Tensor, counted: Tensor | None = None) -> Tensor:
        """Sigmoid - label, weighted as torch does."""
        p, y = prediction.sigmoid(), targets.to(prediction.dtype)
        positive = 1.0 if self.pos_weight is None else self.pos_weight.to(prediction)
        found = (1 - y) * p - positive * y * (1 - p)
        found = found if self.weight is None else found * self.weight.to(prediction)
        return found if counted is None else found * counted

    def variance(self, prediction: Tensor, change: Tensor) -> Tensor:
        """Mean p (1 - p) t^2."""
        p = prediction.sigmoid()
        return (p * (1 - p) * change.square()).mean()

    def divergence(self, before: Tensor, after: Tensor) -> Tensor:
        """Mean KL between the two pairs of probabilities."""
        p = before.sigmoid()
        rise = p * (F.logsigmoid(before) - F.logsigmoid(after))
        return (rise + (1 - p) * (F.logsigmoid(-before) - F.logsigmoid(-after))).mean()
