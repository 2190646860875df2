"""What a network is measured by besides what it gets right: latency, and radii of the curvature."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flatprune.data import Dataset
from flatprune.flatness.hessian import hessian_lambda_max, loss_along_top_eigenvector
from flatprune.pruning.latency import batch_of, measure
from kfac_ext.curvature import Curvature
from kfac_ext.curvature.modes import module_modes, undisturbed

LATENCY_BATCHES = (1, 128)
_HESSIAN_SAMPLES = 1024
_HESSIAN_ITERATIONS = 50
_RADIUS_BATCH = 256
_RADIUS_POWER_STEPS = 50


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


def hessian_radius(model: nn.Module, dataset: Dataset, seed: int) -> float:
    """Largest eigenvalue of the Hessian of the mean cross entropy over the first 1,024 training images."""
    x, y = dataset.x_train[:_HESSIAN_SAMPLES], dataset.y_train[:_HESSIAN_SAMPLES]
    generator = torch.Generator(x.device).manual_seed(seed)
    criterion = nn.CrossEntropyLoss()
    return float(hessian_lambda_max(model, x, y, criterion, iterations=_HESSIAN_ITERATIONS, generator=generator))


def valleys(networks: Mapping[str, nn.Module], sharpest: float, dataset: Dataset, seed: int) -> dict[str, Any]:
    """The mean cross entropy along the top eigenvector of each network's Hessian, at the same distances for all.

    Args:
        networks: name -> network.
        sharpest: the largest of their `hessian_radius`. The farthest distance is where the loss of that network rises
            by about 1, L + lambda_max t^2 / 2; 1 where no network curves upwards.
        dataset: of whose training images the first 1,024 count.
        seed: of the start vectors.

    Returns:
        `distances`, and name -> losses.
    """
    x, y = dataset.x_train[:_HESSIAN_SAMPLES], dataset.y_train[:_HESSIAN_SAMPLES]
    reach = math.sqrt(2.0 / sharpest) if sharpest > 0.0 else 1.0
    found: dict[str, Any] = {}
    for name, network in networks.items():
        generator = torch.Generator(x.device).manual_seed(seed)
        valley = loss_along_top_eigenvector(network, x, y, nn.CrossEntropyLoss(), reach=reach, generator=generator)
        found |= {"distances": valley.distances, name: valley.losses}
    return found


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each of several ranks measures the same
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


def all_radii(model: nn.Module, curvature: Curvature, dataset: Dataset, seed: int) -> dict[str, float]:
    """`hessian_radius` as `hessian_lambda_max`, beside `radii_of_both_kinds` on the same images."""
    kinds = radii_of_both_kinds(model, curvature, dataset.x_train[:_HESSIAN_SAMPLES], seed)
    return {"hessian_lambda_max": hessian_radius(model, dataset, seed), **kinds}
