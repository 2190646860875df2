"""What a run says about its target: whether it can be reached, and what was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flatprune.errors import InputError
from flatprune.pruning.predicted_vs_measured import predicted_vs_measured
from flatprune.pruning.pruner import Pruner
from flatprune.pruning.targets import UNITS, Target, amount


def check_reachable(pruner: Pruner, model: str) -> None:
    """Refuse a target below what the limits leave of the network.

    Raises:
        InputError: naming target, limits and the least that is left.
    """
    target, start, least = pruner.target, pruner.cost_start, pruner.reachable()
    if least <= target.fraction * start:
        return
    goal, whole, kept = (amount(target.unit, cost) for cost in (target.fraction * start, start, least))
    raise InputError(
        f"target_{target.unit} is {target.fraction:g}, {goal} of {whole} {UNITS[target.unit]}, but {model} keeps "
        f"at least {kept} ({least / start:.2g}) with round_to {pruner.limits.round_to} and "
        f"min_width {pruner.limits.min_width}"
    )


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
