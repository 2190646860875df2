"""Losses whose Fisher information is known: what of a prediction is drawn, and the gradient that follows.

A *prediction* is the model's output as a loss reads it: samples first, classes (where there are any) second. With the
mean loss L = 1/D sum of l over D terms (docs/losses.md has D of each), G = 1/D sum of g g^T, g the gradient of
D L: that of the sum of the terms.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_ext.curvature.modes import reading_is_free, sent

_EPS = 1e-8  # as `torch.nn.functional.poisson_nll_loss`


class Loss(ABC):
    """What curvature knows of a loss; `Curvature.loss` is one.

    Attributes:
        name: as in `Curvature(loss=...)`.
        reduction: of the loss that the user backpropagates, "mean" or "sum".
        needs_output: False: nothing of the model's output is read.
        has_classes: whether one dimension of the output holds classes that exclude each other.
    """

    name: str
    needs_output = True
    has_classes = False

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

    def terms(self, prediction: Tensor) -> int:
        """D, how many terms the mean loss is a mean of."""
        return prediction.numel()

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

    def positions(self, mask: Tensor) -> Tensor:
        """A mask of terms as [N, P] over the positions of each sample, true where one of their terms is."""
        return mask.flatten(2).any(dim=1) if mask.dim() > 2 else mask.flatten(1).any(dim=1, keepdim=True)

    @abstractmethod
    def draw(self, prediction: Tensor, generator: torch.Generator) -> Tensor:
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


class CrossEntropy(Loss):
    """Cross entropy of logits (or log-probabilities) [N, C, ...]; each label is a term.

    Args:
        reduction: "mean" or "sum".
        weight: of each class, [C]; a mean divides by the weights of the labels.
    """

    name, has_classes = "cross_entropy", True

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

    def positions(self, mask: Tensor) -> Tensor:
        """Every term is a position."""
        return mask.flatten(1) if mask.dim() > 1 else mask[:, None]

    def draw(self, prediction: Tensor, generator: torch.Generator) -> Tensor:
        """Labels [N, ...]."""
        cumulative = _plain(prediction).softmax(dim=1).movedim(1, -1).cumsum(dim=-1)
        draw = _uniform((*cumulative.shape[:-1], 1), cumulative, generator)
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

    def __init__(self, reduction: str = "mean", weight: Tensor | None = None, pos_weight: Tensor | None = None) -> None:
        super().__init__(reduction)
        self.weight, self.pos_weight = weight, pos_weight

    def ignored(self, prediction: Tensor, gradient: Tensor) -> Tensor | None:
        """Where the gradient is zero though the prediction is not certain."""
        zero = gradient == 0
        if reading_is_free(zero.device) and not bool(zero.any()):
            return None
        p = prediction.sigmoid()
        return zero & (p > 0) & (p < 1)

    def draw(self, prediction: Tensor, generator: torch.Generator) -> Tensor:
        """0 or 1 for each logit."""
        p = _plain(prediction).sigmoid()
        return (_uniform(p.shape, p, generator) < p).to(p.dtype)

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


class MeanSquaredError(Loss):
    """torch's mean over all elements: l_n = 1/C |f - y|^2 is the negative log-likelihood of N(f, C/2 I).

    So that E[g g^T] at the output is its Hessian 2/C I. Each sample is a term.
    """

    name = "mse"

    def terms(self, prediction: Tensor) -> int:
        """N."""
        return prediction.shape[0]

    def elements(self, prediction: Tensor) -> int:
        """N C."""
        return prediction.numel()

    def draw(self, prediction: Tensor, generator: torch.Generator) -> Tensor:
        """Values like the prediction."""
        values = _plain(prediction)
        noise = torch.randn(values.shape, generator=generator, device=generator.device, dtype=values.dtype)
        return values + (values[0].numel() / 2) ** 0.5 * sent(noise, values.device)

    def gradient(self, prediction: Tensor, targets: Tensor, counted: Tensor | None = None) -> Tensor:
        """2/C (f - y)."""
        return (prediction - targets.to(prediction.dtype)) * (2.0 / prediction[0].numel())

    def variance(self, prediction: Tensor, change: Tensor) -> Tensor:
        """Mean 2/C |t|^2."""
        return change.square().sum() * (2.0 / prediction.numel())

    def divergence(self, before: Tensor, after: Tensor) -> Tensor:
        """The mean squared difference."""
        return (after - before).square().mean()


class PoissonNll(Loss):
    """`torch.nn.functional.poisson_nll_loss`; each element is a term.

    Args:
        reduction: "mean" or "sum".
        log_input: the output is the logarithm of the rate, as torch has it by default.
    """

    name = "poisson_nll"

    def __init__(self, reduction: str = "mean", *, log_input: bool = True) -> None:
        super().__init__(reduction)
        self.log_input = log_input

    def rate(self, prediction: Tensor) -> Tensor:
        """lambda of each element."""
        return prediction.exp() if self.log_input else prediction.clamp_min(0) + _EPS

    def draw(self, prediction: Tensor, generator: torch.Generator) -> Tensor:
        """Counts."""
        rates = self.rate(_plain(prediction))
        return torch.poisson(rates.to(generator.device), generator=generator).to(rates.device)

    def gradient(self, prediction: Tensor, targets: Tensor, counted: Tensor | None = None) -> Tensor:
        """Rate - count, or 1 - count/rate of the rate itself."""
        rate, y = self.rate(prediction), targets.to(prediction.dtype)
        return rate - y if self.log_input else 1 - y / rate

    def variance(self, prediction: Tensor, change: Tensor) -> Tensor:
        """Mean lambda t^2, or t^2/lambda."""
        rate = self.rate(prediction)
        return (change.square() * (rate if self.log_input else 1 / rate)).mean()

    def divergence(self, before: Tensor, after: Tensor) -> Tensor:
        """Mean KL between the two rates."""
        p, q = self.rate(before), self.rate(after)
        return (p * (p.log() - q.log()) - p + q).mean()


class GaussianNll(Loss):
    """`torch.nn.functional.gaussian_nll_loss` of two outputs, mean and variance; each element is a term.

    The prediction is [N, 2, ...]: means, then variances.
    """

    name = "gaussian_nll"

    def check(self, prediction: Tensor) -> None:
        """Raise ValueError for one output instead of two."""
        if prediction.dim() < 2 or prediction.shape[1] != 2:
            raise ValueError(
                f"Curvature: output {tuple(prediction.shape)}, expected two outputs, mean and variance, for "
                "gaussian_nll: output=lambda out: (mean, variance) gives them"
            )
        super().check(prediction)

    def drawn_shape(self, shape: torch.Size) -> torch.Size:
        """Without the second dimension."""
        return torch.Size((shape[0], *shape[2:]))

    def terms(self, prediction: Tensor) -> int:
        """The elements of the mean."""
        return prediction.numel() // 2

    def draw(self, prediction: Tensor, generator: torch.Generator) -> Tensor:
        """Values [N, ...]."""
        mean, variance = _plain(prediction).unbind(1)
        noise = torch.randn(mean.shape, generator=generator, device=generator.device, dtype=mean.dtype)
        return mean + variance.sqrt() * sent(noise, mean.device)

    def gradient(self, prediction: Tensor, targets: Tensor, counted: Tensor | None = None) -> Tensor:
        """Of mean and variance."""
        mean, variance = prediction.unbind(1)
        off = mean - targets.to(mean.dtype)
        return torch.stack([off / variance, (1 - off.square() / variance) / (2 * variance)], dim=1)

    def variance(self, prediction: Tensor, change: Tensor) -> Tensor:
        """mean[t_mean^2 / v + t_v^2 / (2 v^2)]."""
        variance = prediction[:, 1]
        return (change[:, 0].square() / variance + change[:, 1].square() / (2 * variance.square())).mean()

    def divergence(self, before: Tensor, after: Tensor) -> Tensor:
        """Mean KL between the two Gaussians."""
        (m, v), (n, w) = before.unbind(1), after.unbind(1)
        return ((w / v).log() + (v + (m - n).square()) / w - 1).mean() / 2


class OtherLoss(Loss):
    """Any loss, by the empirical Fisher alone: a mean over samples, of whose form nothing is known."""

    name, needs_output = "other", False

    def draw(self, prediction: Tensor, generator: torch.Generator) -> Tensor:
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
    scaled for it, as the outputs may have different numbers of terms.

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
        counts = {loss.terms(part) for loss, part in zip(self.losses, self.apart(prediction))}
        return counts.pop() if len(counts) == 1 else len(prediction)

    def draw(self, prediction: Tensor, generator: torch.Generator) -> Tensor:
        """The targets of all outputs, [N, sum of their sizes]."""
        drawn = [loss.draw(part, generator) for loss, part in zip(self.losses, self.apart(prediction))]
        return torch.cat([t.reshape(len(t), -1).double() for t in drawn], dim=1)

    def gradient(self, prediction: Tensor, targets: Tensor, counted: Tensor | None = None) -> Tensor:
        """Those of all outputs, each by the root of D/D of its own."""
        total, parts = self.terms(prediction), self.apart(prediction)
        shapes = [loss.drawn_shape(part.shape) for loss, part in zip(self.losses, parts)]
        apart = targets.split([math.prod(shape[1:]) for shape in shapes], dim=1)
        found = []
        for loss, part, y, shape in zip(self.losses, parts, apart, shapes):
            own = y.reshape(shape).long() if loss.has_classes else y.reshape(shape)
            found.append(loss.gradient(part, own) * (total / loss.terms(part)) ** 0.5)
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


def _plain(prediction: Tensor) -> Tensor:
    """Detached, float32 or float64."""
    return prediction.detach().to(torch.float64 if prediction.dtype == torch.float64 else torch.float32)


def _uniform(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    draw = torch.rand(tuple(shape), generator=generator, device=generator.device, dtype=like.dtype)
    return sent(draw, like.device)
