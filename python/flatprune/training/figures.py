"""The figures of `summary.json` about the network and the target of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flatprune import models
from flatprune.pruning.predicted_vs_measured import predicted_vs_measured
from flatprune.pruning.pruner import Pruner
from flatprune.pruning.targets import Target
from flatprune.training.evaluation import accuracy, calibration, corruption_accuracies, evaluate, predictions
from flatprune.training.measurements import hessian_radius, latency_figures
from flatprune.training.trainer import Trainer


def results(trainer: Trainer) -> dict[str, Any]:
    """The figures of `summary.json` that describe the network as it is now (see `flatprune.runs.summary`)."""
    model, dataset = trainer.result, trainer.dataset
    train_accuracy, _ = evaluate(model, dataset.x_train, dataset.y_train)
    logits = predictions(model, dataset.x_test)
    return {
        "params_before": trainer.params_before,
        "params_after": trainer.params,
        "macs_before": trainer.macs_before,
        "macs_after": models.multiply_accumulates(model, dataset.x_test[:1]),
        "test_accuracy_last": accuracy(logits, dataset.y_test),
        "test_accuracy_best": trainer.progress.best_accuracy,
        "train_accuracy_last": train_accuracy,
        "spectral_radius_kfac": float(trainer.curvature.spectral_radius()),
        "spectral_radius_kfac_geometric_mean": float(trainer.curvature.geometric_mean_radius()),
        "widths_before": trainer.widths_before,
        "widths_after": models.layer_widths(model),
        "seconds": trainer.progress.seconds,
        "removal_seconds": trainer.progress.removal_seconds,
        **target_figures(trainer.settings.target, trainer.pruner, trainer.history),
        **calibration(logits, dataset.y_test),
        **_measurements(trainer),
    }


def _measurements(trainer: Trainer) -> dict[str, Any]:
    model, dataset = trainer.result, trainer.dataset
    found: dict[str, Any] = {}
    if trainer.settings.track_hessian != 0:
        found["hessian_lambda_max"] = hessian_radius(model, dataset, trainer.settings.seed)
    if trainer.settings.corruptions:
        found |= corruption_accuracies(model, dataset)
    if trainer.settings.measure_latency:
        found |= latency_figures(trainer.untrained().to(trainer.device), model, dataset.x_test[:1])
    return found


def target_figures(target: Target, pruner: Pruner | None, history: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of `summary.json` about target and pruning; without a pruner costs are None.

    Args:
        target: of the settings.
        pruner: when all is done, or None where nothing was pruned.
        history: records of `history.jsonl`.
    """
    figures: dict[str, Any] = {
        "target_unit": target.unit,
        "target_fraction": target.fraction,
        "cost_before": None,
        "cost_after": None,
        "pruning_stopped": None,
        "predicted_vs_measured": predicted_vs_measured(history),
    }
    if pruner is not None:
        figures["cost_before"] = pruner.cost_start
        figures["cost_after"] = pruner.measured_latency() if target.unit == "latency" else pruner.cost
        figures["pruning_stopped"] = pruner.stopped or None
    return figures
