"""What a network gets right: accuracy, loss, calibration, and accuracy on corrupted images."""

from __future__ import annotations

import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatprune.data import Dataset
from flatprune.training.corruptions import KINDS, STRENGTHS, corrupted
from kfac_ext.curvature.modes import module_modes

CALIBRATION_BINS = 15
_BATCH = 1000


@torch.no_grad()
def predictions(model: nn.Module, x: Tensor) -> Tensor:
    """Logits [n, classes] of inputs [n, ...] in evaluation mode; the modes of the model's modules are restored."""
    with module_modes(dict.fromkeys(model.modules(), False)):
        return torch.cat([model(part) for part in x.split(_BATCH)])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Percent of the labels that the largest logit names."""
    return 100.0 * int((logits.argmax(1) == labels).sum()) / len(labels)


def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Accuracy in percent and mean cross entropy of `model`, in evaluation mode.

    Args:
        model: maps a batch of x to logits [n, classes].
        x: inputs [n, ...].
        y: labels [n].
    """
    logits = predictions(model, x)
    return accuracy(logits, y), float(F.cross_entropy(logits.double(), y))


def calibration(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Negative log-likelihood and expected calibration error of predictions.

    NLL = mean -log p_label. ECE = sum over 15 equal bins of the confidence max p of
    |bin| / n |accuracy(bin) - mean confidence(bin)| (Guo et al. 2017, arXiv 1706.04599), as a fraction, not percent.

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
    nll = F.nll_loss(log_p, labels)
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
