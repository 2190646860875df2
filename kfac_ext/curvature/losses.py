"""The losses that curvature knows, by name or by torch's criteria; several of them, and any other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_ext.curvature.draws import Draws
from kfac_ext.curvature.label_losses import BinaryCrossEntropy, CrossEntropy
from kfac_ext.curvature.loss import Loss
from kfac_ext.curvature.value_losses import GaussianNll, MeanSquaredError, PoissonNll


class OtherLoss(Loss):
    """Any loss, by the empirical Fisher alone: a mean over samples, of whose form nothing is known."""

    name, needs_output = "other", False

    def draw(self, prediction: Tensor, draws: Draws) -> Tensor:
        """Raise ValueError."""
        raise self._unknown()

    def gradient(self, prediction: Tensor, targets: Tensor, counted: Tensor | None = None) -> Tensor:
        """Raise ValueError."""
        raise self._unknown()

    def variance(self, prediction: Tensor, change: Tensor) -> Tensor:
        """Raise ValueError."""
        raise self._unknown()

    def divergence(self, before: Tensor, after: Tensor) -> Tensor:
        """Raise ValueError."""
        raise self._unknown()

    def _unknown(self) -> ValueError:
        return ValueError("Curvature: loss is 'other', of which no labels can be drawn; name the loss, or do without")


class SeveralLosses(Loss):
    """The sum of the mean losses of several outputs; the prediction is all of theirs, [N, sum of their sizes].

    Drawn labels of different outputs are independent, so G is the sum of what each alone would give; each gradient is
    scaled for it, as the outputs may have different numbers of terms. A mask of terms is [N, sum of those of a sample].

    Args:
        losses: of each output.
        shapes: of one sample of each prediction, set when outputs are read.
    """

    name = "several"

    def __init__(self, losses: Sequence[Loss]) -> None:
        super().__init__(losses[0].reduction)
        self.losses = list(losses)
        self.shapes: list[torch.Size] = []

    def apart(self, prediction: Tensor) -> list[Tensor]:
        """The prediction of each output, as its own loss reads it."""
        parts = prediction.split([math.prod(shape) for shape in self.shapes], dim=1)
        return [part.unflatten(1, shape) if len(shape) else part[:, 0] for part, shape in zip(parts, self.shapes)]

    def together(self, parts: Sequence[Tensor]) -> Tensor:
        """One prediction of those of all outputs; their shapes are kept."""
        self.shapes = [part.shape[1:] for part in parts]
        return torch.cat([part.reshape(len(part), -1) for part in parts], dim=1)

    def terms(self, prediction: Tensor) -> int:
        """That of every output where they agree, else N."""
        return self.counted_terms(prediction, None)

    def counted_terms(self, prediction: Tensor, counted: Tensor | None) -> int:
        """That of every output where they agree, else N."""
        parts = self.apart(prediction)
        masks = [None] * len(parts) if counted is None else self._terms_apart(counted)
        counts = {
            loss.counted_terms(part, None if mask is None or bool(mask.all()) else mask)
            for loss, part, mask in zip(self.losses, parts, masks)
        }
        return counts.pop() if len(counts) == 1 else len(prediction)

    def _terms_apart(self, values: Tensor) -> list[Tensor]:
        """Targets or a mask, [N, sum of their sizes], as each output has them."""
        shapes = [loss.drawn_shape(torch.Size((len(values), *shape))) for loss, shape in zip(self.losses, self.shapes)]
        parts = values.split([math.prod(shape[1:]) for shape in shapes], dim=1)
        return [part.reshape(shape) for part, shape in zip(parts, shapes)]

    def ignored(self, prediction: Tensor, gradient: Tensor) -> Tensor | None:
        """Those of all outputs."""
        triples = zip(self.losses, self.apart(prediction), self.apart(gradient))
        found = [(loss, part, loss.ignored(part, slope)) for loss, part, slope in triples]
        if all(mask is None for *_, mask in found):
            return None
        masks = [
            mask if mask is not None else part.new_zeros(loss.drawn_shape(part.shape), dtype=torch.bool)
            for loss, part, mask in found
        ]
        return torch.cat([mask.reshape(len(mask), -1) for mask in masks], dim=1)

    def positions(self, mask: Tensor) -> list[Tensor]:
        """Those of all outputs."""
        return [p for loss, own in zip(self.losses, self._terms_apart(mask)) for p in loss.positions(own)]

    def draw(self, prediction: Tensor, draws: Draws) -> Tensor:
        """The targets of all outputs, [N, sum of their sizes]."""
        drawn = [loss.draw(part, draws) for loss, part in zip(self.losses, self.apart(prediction))]
        return torch.cat([t.reshape(len(t), -1).double() for t in drawn], dim=1)

    def gradient(self, prediction: Tensor, targets: Tensor, counted: Tensor | None = None) -> Tensor:
        """Those of all outputs, each by the root of D/D of its own."""
        total, found = self.terms(prediction), []
        for loss, part, y in zip(self.losses, self.apart(prediction), self._terms_apart(targets)):
            own = loss.gradient(part, y.long() if loss.has_classes else y)
            found.append(own * (total / loss.terms(part)) ** 0.5)
        return torch.cat([g.reshape(len(g), -1) for g in found], dim=1)

    def variance(self, prediction: Tensor, change: Tensor) -> Tensor:
        """The sum over outputs."""
        pairs = zip(self.losses, self.apart(prediction), self.apart(change))
        return torch.stack([loss.variance(part, moved) for loss, part, moved in pairs]).sum()

    def divergence(self, before: Tensor, after: Tensor) -> Tensor:
        """The sum over outputs."""
        pairs = zip(self.losses, self.apart(before), self.apart(after))
        return torch.stack([loss.divergence(old, new) for loss, old, new in pairs]).sum()


LOSSES: dict[str, type[Loss]] = {
    kind.name: kind for kind in (CrossEntropy, MeanSquaredError, BinaryCrossEntropy, PoissonNll, GaussianNll, OtherLoss)
}


def loss_of(given: str | Callable[..., Any] | Sequence[Any], reduction: str | None = None) -> Loss:
    """The loss of a name, of a criterion of torch (with its weights and reduction), or of one for each output.

    Args:
        given: a name of `LOSSES`, a criterion, any other function or module (`OtherLoss`), or a list of these.
        reduction: "mean" or "sum"; None: that of the criterion, "mean" where it has none.

    Raises:
        ValueError: there is no loss of that name, or `reduction` is neither.
        TypeError: it is nothing of that kind.
    """
    if reduction not in (None, "mean", "sum"):
        raise ValueError(f"Curvature: reduction is {reduction!r}, expected 'mean' or 'sum'")
    if isinstance(given, (list, tuple)):
        if not given:
            raise ValueError("Curvature: loss is empty, expected a loss for each output")
        return SeveralLosses([loss_of(one, reduction) for one in given])
    if isinstance(given, str):
        if given not in LOSSES:
            raise ValueError(f"Curvature: loss is {given!r}, expected one of {', '.join(map(repr, LOSSES))}")
        return LOSSES[given](reduction or "mean")
    if not callable(given):
        raise TypeError(f"Curvature: loss is {given!r}, expected a name, a criterion of torch or a function")
    own = getattr(given, "reduction", None)
    reduction = reduction or ("sum" if own == "sum" else "mean")
    if isinstance(given, (nn.CrossEntropyLoss, nn.NLLLoss)):
        return CrossEntropy(reduction, given.weight)
    if isinstance(given, nn.BCEWithLogitsLoss):
        return BinaryCrossEntropy(reduction, given.weight, given.pos_weight)
    if isinstance(given, nn.MSELoss):
        return MeanSquaredError(reduction)
    if isinstance(given, nn.PoissonNLLLoss):
        return PoissonNll(reduction, log_input=given.log_input)
    if isinstance(given, nn.GaussianNLLLoss):
        return GaussianNll(reduction)
    return _OF_FUNCTIONS[given](reduction) if given in _OF_FUNCTIONS else OtherLoss(reduction)


_OF_FUNCTIONS: dict[Callable[..., Any], type[Loss]] = {
    F.cross_entropy: CrossEntropy,
    F.nll_loss: CrossEntropy,
    F.binary_cross_entropy_with_logits: BinaryCrossEntropy,
    F.mse_loss: MeanSquaredError,
    F.poisson_nll_loss: PoissonNll,
    F.gaussian_nll_loss: GaussianNll,
}
