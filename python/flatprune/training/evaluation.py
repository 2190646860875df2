"""What a network gets right, and the figures of `summary.json` about the network of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flatprune import models
from flatprune.data import Dataset
from flatprune.flatness.spectrum import hessian_lambda_max
from flatprune.training.goals import target_figures
from flatprune.training.measurements import (
    accuracy,
    calibration,
    corruption_accuracies,
    latency_figures,
    predictions,
    radii_of_both_kinds,
)

if TYPE_CHECKING:
    from flatprune.training.trainer import Trainer

_EVALUATION_BATCH = 1000
_HESSIAN_SAMPLES = 1024
_HESSIAN_ITERATIONS = 50


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Accuracy in percent and mean cross entropy of `model`, in evaluation mode; its mode is restored.

    Args:
        model: maps a batch of x to logits [n, classes].
        x: inputs [n, ...].
        y: labels [n].
    """
    training = model.training
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=x.device)
    loss = torch.zeros((), dtype=torch.float64, device=x.device)
    for images, labels in zip(x.split(_EVALUATION_BATCH), y.split(_EVALUATION_BATCH)):
        logits = model(images)
        correct += (logits.argmax(1) == labels).sum()
        loss += nn.functional.cross_entropy(logits, labels, reduction="sum")
    model.train(training)
    return 100.0 * int(correct) / len(x), float(loss) / len(x)


def hessian_radius(model: nn.Module, dataset: Dataset, seed: int) -> float:
    """Largest eigenvalue of the Hessian of the mean cross entropy over the first 1,024 training images."""
    x, y = dataset.x_train[:_HESSIAN_SAMPLES], dataset.y_train[:_HESSIAN_SAMPLES]
    generator = torch.Generator(x.device).manual_seed(seed)
    criterion = nn.CrossEntropyLoss()
    return float(hessian_lambda_max(model, x, y, criterion, iterations=_HESSIAN_ITERATIONS, generator=generator))


def tracked_radii(trainer: Trainer, epoch: int) -> dict[str, float]:
    """The true radius and K-FAC radii of both kinds, for `history.jsonl`; empty after epochs that do not ask for it."""
    every = trainer.settings.track_hessian
    if every is None or (epoch % every and epoch != trainer.settings.epochs):
        return {}
    model, dataset, seed = trainer.result, trainer.dataset, trainer.settings.seed
    radii = radii_of_both_kinds(model, trainer.curvature, dataset.x_train[:_HESSIAN_SAMPLES], seed)
    return {"hessian_lambda_max": hessian_radius(model, dataset, seed), **radii}


def results(trainer: Trainer) -> dict[str, Any]:
    """The figures of `summary.json` that describe the network as it is now (see `flatprune.runs`)."""
    model, dataset = trainer.result, trainer.dataset
    train_accuracy, _ = evaluate(model, dataset.x_train, dataset.y_train)
    logits = predictions(model, dataset.x_test)
    return {
        "params_before": trainer.params_before,
        "params_after": trainer.params,
        "macs_before": trainer.macs_before,
        "macs_after": models.multiply_accumulates(model, dataset.image_shape),
        "test_accuracy_last": accuracy(logits, dataset.y_test),
        "test_accuracy_best": trainer.progress.best_accuracy,
        "train_accuracy_last": train_accuracy,
        "spectral_radius_kfac": float(trainer.curvature.spectral_radius()),
        "spectral_radius_kfac_geometric_mean": float(trainer.curvature.geometric_mean_radius()),
        "hessian_lambda_max": hessian_radius(model, dataset, trainer.settings.seed),
        "widths_before": trainer.widths_before,
        "widths_after": models.layer_widths(model),
        "seconds": trainer.progress.seconds,
        **target_figures(trainer.settings.target, trainer.pruner, trainer.history),
        **calibration(logits, dataset.y_test),
        **_measurements(trainer),
    }


def _measurements(trainer: Trainer) -> dict[str, Any]:
    model, dataset = trainer.result, trainer.dataset
    found: dict[str, Any] = {}
    if trainer.settings.corruptions:
        found |= corruption_accuracies(model, dataset)
    if trainer.settings.measure_latency:
        found |= latency_figures(trainer.untrained().to(trainer.device), model, dataset.x_test[:1])
    return found
