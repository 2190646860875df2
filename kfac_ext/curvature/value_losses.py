"""Losses of values: squared errors, counts, Gaussians of their own variance."""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_ext.curvature.draws import Draws
from kfac_ext.curvature.loss import Loss, plain

_EPS = 1e-8  # as `torch.nn.functional.poisson_nll_loss`


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

    def draw(self, prediction: Tensor, draws: Draws) -> Tensor:
        """Values like the prediction."""
        values = plain(prediction)
        return values + (values[0].numel() / 2) ** 0.5 * draws.normal(values)

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

    def draw(self, prediction: Tensor, draws: Draws) -> Tensor:
        """Counts."""
        return draws.poisson(self.rate(plain(prediction)))

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

    def draw(self, prediction: Tensor, draws: Draws) -> Tensor:
        """Values [N, ...]."""
        mean, variance = plain(prediction).unbind(1)
        return mean + variance.sqrt() * draws.normal(mean)

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
