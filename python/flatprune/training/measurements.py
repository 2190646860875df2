"""What a network is measured by besides its accuracy: calibration, corrupted images, latency, radii of both kinds."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flatprune.pruning.latency import batch_of, measure
from flatprune.training.corruptions import KINDS, STRENGTHS, corrupted
from kfac_ext.curvature import Curvature
from kfac_ext.curvature.modes import module_modes, undisturbed

if TYPE_CHECKING:
    from flatprune.data import Dataset

CALIBRATION_BINS = 15
LATENCY_BATCHES = (1, 128)
_EVALUATION_BATCH = 1000
_RADIUS_BATCH = 256
_RADIUS_POWER_STEPS = 50


@torch.no_grad()
def predictions(model: nn.Module, x: Tensor) -> Tensor:
    """Logits [n, classes] of inputs [n, ...] in evaluation mode; the modes of the model's modules are restored."""
    with module_modes(dict.fromkeys(model.modules(), False)):
        return torch.cat([model(part) for part in x.split(_EVALUATION_BATCH)])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Percent of the labels that the largest logit names."""
    return 100.0 * int((logits.argmax(1) == labels).sum()) / len(labels)


def calibration(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Negative log-likelihood and expected calibration error of predictions.

    NLL = mean -log p_label. ECE = sum over 15 equal bins of the confidence max p of
    |bin| / n |accuracy(bin) - mean confidence(bin)| (Guo et al. 2017, arXiv 1706.04599), as a share, not percent.

    Args:
        logits: [n, classes].
        labels: int64 [n].

    Returns:
        `test_nll` and `test_ece`.

    Example:
        >>> calibration(torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]))["test_ece"]
        0.0
    """
    log_p = logits.double().log_softmax(1)
    confidence, predicted = log_p.exp().max(1)
    right = (predicted == labels).double()
    place = (confidence * CALIBRATION_BINS).ceil().long().sub_(1).clamp_(0, CALIBRATION_BINS - 1)  # (low, high]
    gaps = torch.zeros(CALIBRATION_BINS, dtype=torch.float64, device=logits.device)
    gaps.index_add_(0, place, right - confidence)
    nll = torch.nn.functional.nll_loss(log_p, labels)
    return {"test_nll": float(nll), "test_ece": float(gaps.abs().sum() / len(labels))}


def corruption_accuracies(model: nn.Module, dataset: Dataset) -> dict[str, Any]:
    """Accuracy on the corrupted test images (see `flatprune.training.corruptions`).

    Returns:
        `corrupted_accuracy`: kind -> percent at strengths 1 to 5; `corrupted_accuracy_mean`: the mean of all of them.
    """
    found = {
        kind: [
            accuracy(
                predictions(model, corrupted(dataset.x_test, dataset.normalization, kind, strength)), dataset.y_test
            )
            for strength in STRENGTHS
        ]
        for kind in KINDS
    }
    mean = statistics.fmean(value for values in found.values() for value in values)
    return {"corrupted_accuracy": found, "corrupted_accuracy_mean": mean}


def latency(model: nn.Module, example: Tensor) -> dict[int, float]:
    """Batch size -> milliseconds an image of inference on the model's device, by `flatprune.pruning.latency.measure`.

    Args:
        model: taken in evaluation mode; unchanged.
        example: an input [1, ...] on the model's device.
    """
    return {size: 1000.0 * measure(model, batch_of((example,), size)) / size for size in LATENCY_BATCHES}


def latency_figures(before: nn.Module, after: nn.Module, example: Tensor) -> dict[str, float]:
    """`latency_before_1`, `latency_after_1`, `latency_before_128`, `latency_after_128`: ms an image, by `latency`."""
    old, new = latency(before, example), latency(after, example)
    return {f"latency_{name}_{size}": value[size] for size in old for name, value in (("before", old), ("after", new))}


def radii_of_both_kinds(model: nn.Module, curvature: Curvature, x: Tensor, seed: int) -> dict[str, float]:
    """K-FAC radii from factors measured afresh on `x`, once with *expand* and once with *reduce*.

    The factors are plain means over batches of 256; the model's weights, statistics and random streams stay.

    Args:
        model: as it trains.
        curvature: its running factors, which see nothing of this.
        x: inputs, best those on which the Hessian is measured.
        seed: of the labels that the true Fisher draws.

    Returns:
        `radius_expand`, `radius_reduce` (the largest block) and `..._geometric_mean` of each.
    """
    found = {}
    for kind in ("expand", "reduce"):
        fresh = Curvature(
            model,
            kfac_approx=kind,
            factor_update_steps=1,
            factor_decay=lambda step: step / (step + 1),
            generator=torch.Generator().manual_seed(seed),
        )
        modes = dict.fromkeys(model.modules(), True)
        with curvature.paused(), fresh, module_modes(modes), undisturbed(model), torch.enable_grad():
            for part in x.split(_RADIUS_BATCH):
                model(part)
            fresh.factors.power_iteration_(max_iter=_RADIUS_POWER_STEPS)
            found[f"radius_{kind}"] = float(fresh.spectral_radius())
            found[f"radius_{kind}_geometric_mean"] = float(fresh.geometric_mean_radius())
    return found
