"""`summary.json`: what a finished run has found.

    format, version                        "flatprune-summary", 1
    data, model, seed, epochs, steps, train_images, test_images, image_shape, classes: what was done
    class_names                            in the order of the outputs, null where the data have none
    target_params                          fraction of the parameters to reach, null for a target in another unit
    target_unit, target_fraction           params, macs, neurons or latency, and the fraction of it to reach
    held_out_images                        training images that only judged whether to go on pruning
    params_before, params_after            trainable scalars
    macs_before, macs_after                multiply-accumulates of matrix products and convolutions for one image
    test_accuracy_last, test_accuracy_best percent, after the last epoch and after the best of those tested
    train_accuracy_last                    percent, of the final network on its training images and (noisy) labels
    test_nll, test_ece                     calibration of the final network, see `flatprune.training.evaluation`
    corrupted_accuracy                     kind -> percent at strengths 1 to 5, with _mean beside it; where asked for
    latency_before_1, latency_after_1      ms an image, median, at batch size 1, and likewise at 128; where asked for
    spectral_radius_kfac                   max over layers of lambda_1(A) lambda_1(G); with _geometric_mean beside it
    hessian_lambda_max                     of the mean loss over the first 1,024 training images, batch norm folded;
                                           but with track_hessian 0
    widths_before, widths_after            layer name -> output channels or features
    cost_before, cost_after                of the network in the target's unit (latency: measured seconds)
    pruning_stopped                        why pruning ended before its time, null if it did not
    predicted_vs_measured                  change of the loss at the cuts, see `flatprune.pruning.predicted_vs_measured`
    seconds                                of training and testing, without start-up
    removal_seconds                        what removal events took of these
    ranks                                  of several processes: how many
    traffic                                by purpose: calls, bytes the first of these gave, seconds it waited
    dense_*, no_flatness_*                 the same of the network trained without pruning, or without the flatness
                                           term, where that was wanted
    valleys                                distances, and the loss at these along the Hessian's top eigenvector, of
                                           each of the networks compared (see `flatprune.loss_along_top_eigenvector`)
    settings, versions                     everything needed to do it again

With the setting `ema`, accuracies, calibration, Hessian and `model.pt` are those of the averaged weights; K-FAC's
factors are measured where the training is. An epoch's training loss is that of its targets, smoothed or mixed.
With the setting `validation`, "test" means the held-out part of the training images everywhere.
"""

from __future__ import annotations

import contextlib
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from flatprune.export import read_saved
from flatprune.runs.folder import COMPARED_FOLDERS
from flatprune.training.figures import results
from flatprune.training.measurements import valleys
from flatprune.training.trainer import Trainer

_TIMES = ("seconds", "removal_seconds")
TIMES = (*_TIMES, *(f"{name}_{time}" for name in COMPARED_FOLDERS for time in _TIMES))
"""Figures of a summary that no two runs have alike; of the records of a history the first."""
_COMPARED_KEYS = (
    "params_after",
    "macs_after",
    "test_accuracy_last",
    "test_accuracy_best",
    "train_accuracy_last",
    "spectral_radius_kfac",
    "hessian_lambda_max",
    "latency_after_1",
    *_TIMES,
)


def summary_of(trainer: Trainer, compared: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What a trainer at its end has found, beside the networks it is compared with (name -> their summaries)."""
    settings = trainer.settings
    summary = {
        "data": settings.data,
        "model": settings.model,
        "seed": settings.seed,
        "epochs": settings.epochs,
        "target_params": settings.target_params,
        "steps": trainer.total_steps,
        "train_images": len(trainer.dataset.x_train),
        "held_out_images": 0 if trainer.guard is None else len(trainer.guard.x),
        "test_images": len(trainer.dataset.x_test),
        "image_shape": list(trainer.dataset.image_shape),
        "classes": trainer.dataset.classes,
        "class_names": trainer.dataset.class_names and list(trainer.dataset.class_names),
        **results(trainer),
        **trainer.traffic(),
    }
    for name, other in compared.items():
        for key in _COMPARED_KEYS:
            if key in other:
                summary[f"{name}_{key.replace('_after', '')}"] = other[key]
    summary["settings"] = {
        **settings.as_dict(),
        "lr": trainer.peak_lr,
        "weight_decay": settings.decay_in_use,
    }
    summary["versions"] = versions()
    return summary


def valleys_of(trainer: Trainer, folder: Path, summaries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The loss along the Hessian's top eigenvector, of this network and of those that it is compared with."""
    networks = {
        name: read_saved(folder / COMPARED_FOLDERS[name]).network().to(trainer.device)
        if name in COMPARED_FOLDERS
        else trainer.result
        for name in summaries
    }
    sharpest = max(summary["hessian_lambda_max"] for summary in summaries.values())
    return valleys(networks, sharpest, trainer.dataset, trainer.settings.seed)


def versions() -> dict[str, str]:
    """Versions of this package, of Python and of what the figures depend on."""
    found = {"python": platform.python_version()}
    for name in ("kfac-ext", "torch", "numpy", "scikit-learn"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
