"""What a network gets right: accuracy, loss, calibration, and accuracy on corrupted images; also a saved one."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatprune import named
from flatprune.data import Dataset, Images, read_images
from flatprune.errors import InputError
from flatprune.export import read_saved
from flatprune.export.saved import SavedNetwork
from flatprune.files.finished import SUMMARY_FILE, read_summary
from flatprune.training.corruptions import KINDS, STRENGTHS, corrupted
from kfac_ext.curvature.modes import module_modes

CALIBRATION_BINS = 15
_BATCH = 1000


@torch.no_grad()
def predictions(model: nn.Module, x: Tensor) -> Tensor:
    """Logits [n, classes, ...] of inputs [n, ...] in evaluation mode; the modes of the model's modules are restored."""
    with module_modes(dict.fromkeys(model.modules(), False)):
        return torch.cat([model(part) for part in x.split(_BATCH)])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Percent of the labels that the largest logit names."""
    return 100.0 * int((logits.argmax(1) == labels).sum()) / labels.numel()


def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Accuracy in percent and mean cross entropy of `model`, in evaluation mode.

    Args:
        model: maps a batch of x to logits [n, classes, ...].
        x: inputs [n, ...].
        y: labels [n, ...].
    """
    logits = predictions(model, x)
    return accuracy(logits, y), float(F.cross_entropy(logits.double(), y))


def calibration(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Negative log-likelihood and expected calibration error of predictions.

    NLL = mean -log p_label. ECE = sum over 15 equal bins of the confidence max p of
    |bin| / n |accuracy(bin) - mean confidence(bin)| (Guo et al. 2017, arXiv 1706.04599), as a fraction, not percent.

    Args:
        logits: [n, classes, ...].
        labels: int64 [n, ...].

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
    gaps.index_add_(0, place.flatten(), (right - confidence).flatten())
    nll = F.nll_loss(log_p, labels)
    return {"test_nll": float(nll), "test_ece": float(gaps.abs().sum() / labels.numel())}


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


def evaluate_saved(
    folder: Path, data: str | None, device: torch.device, model: str | None = None
) -> tuple[float, float, int]:
    """Accuracy in percent, mean cross entropy, and number of the test images.

    Args:
        folder: of a finished run.
        data: see `flatprune.data.read_images`; None: the data of the run.
        device: where to compute.
        model: "module:function" that made the network, where it is one of the user's own.

    Raises:
        InputError: there is no such folder or network, or the images do not fit it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    named.allow(model, data)
    saved = read_saved(folder)
    network = saved.network().to(device)
    summary = read_summary(folder) if (folder / SUMMARY_FILE).is_file() else {}
    if data is None and not summary:
        raise InputError(f"{folder}: has no {SUMMARY_FILE}; name the data with --data")
    images = read_images(data or str(summary["data"]), image_size=saved.normalization.image_size)
    _check_fits(images, saved, summary.get("class_names"))
    x, y = saved.normalization(images.x_test), torch.from_numpy(images.y_test)
    if tuple(x.shape[1:]) != saved.image_shape:
        channels, height, width = saved.image_shape
        shape = "x".join(str(side) for side in images.x_test.shape[1:])
        raise InputError(f"{images.name}: x_test has images of {shape}, the network takes {height}x{width}x{channels}")
    return *evaluate(network, x.to(device), y.to(device)), len(y)


def _check_fits(images: Images, saved: SavedNetwork, learned: list[str] | None) -> None:
    """Raise InputError for classes other than those that the network knows."""
    if learned and images.class_names and list(images.class_names) != learned:
        raise InputError(
            f"{images.name}: has the classes {', '.join(images.class_names)}, the network knows {', '.join(learned)}"
        )
    largest, classes = images.y_test.max(), saved.arguments["classes"]
    if largest >= classes:
        raise InputError(f"{images.name}: y_test has label {largest}, the network knows {classes} classes")
