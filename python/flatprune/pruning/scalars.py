"""What pruning tells while a network trains, as named numbers for curves, and who is told."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Protocol

from flatprune.pruning.costs import MacCount
from flatprune.pruning.pruner import Pruner
from flatprune.pruning.removals import Removal
from kfac_ext.curvature import Curvature

_POWER_STEPS = 10


class Logger(Protocol):
    """Who is told named numbers; `flatprune.integrations.loggers` has those of TensorBoard and others."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Take the scalars of a step of the optimizer, counted from 1; 0 is before the first."""


def state_scalars(pruner: Pruner, curvature: Curvature) -> dict[str, float]:
    """What the network is now. Reading it changes nothing, so that training goes the same way with and without.

    Returns:
        size/params, size/params_fraction (of those at the start), size/macs (for one sample), width/GROUP for each
        group of neurons, and, once there are factors, curvature/spectral_radius: max over layers of
        lambda_1(A) lambda_1(G).
    """
    scalars = {
        "size/params": float(pruner.params),
        "size/params_fraction": pruner.params / pruner.params_start,
        "size/macs": float(MacCount(pruner.groups, pruner.coupling.macs).cost),
        **{f"width/{name}": float(width) for name, width in pruner.widths().items()},
    }
    if curvature.is_updated:
        scalars["curvature/spectral_radius"] = _spectral_radius(curvature)
    return scalars


def _spectral_radius(curvature: Curvature) -> float:
    """Of a copy of the factors: `Curvature.spectral_radius` after a cut would move eigenvectors that training uses."""
    factors = copy.deepcopy(curvature.factors)
    factors.power_iteration_(max_iter=_POWER_STEPS)
    radii = [factors.eigenvalue(f"{n}.A") * factors.eigenvalue(f"{n}.G") for n in sorted(curvature.updated_layers)]
    return max(float(radius.max()) for radius in radii)


def event_scalars(removals: Sequence[Removal]) -> dict[str, float]:
    """What the records of one event say: its cuts together.

    Returns:
        event/removed (neurons), event/predicted_change and event/measured_change of the loss; the last two where there
        are any.
    """
    scalars = {"event/removed": float(sum(record.removed for record in removals))}
    for name in ("predicted_change", "measured_change"):
        by_round = {record.round: getattr(record, name) for record in removals}  # one change a cut, in all its records
        known = [change for change in by_round.values() if change is not None]
        if known:
            scalars[f"event/{name}"] = float(sum(known))
    return scalars
