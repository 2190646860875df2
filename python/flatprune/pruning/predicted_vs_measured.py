"""The predicted change of the loss at each cut against the measured one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from flatprune.pruning.removals import Removal

_LEAST_CUTS = 3  # two points always lie on a line
_DECAY = 0.5  # of what earlier cuts say
_MOST = 10.0  # a factor beyond this, or below its inverse, is an accident


class Cut(NamedTuple):
    """What one cut was predicted to make of the loss, and what it made of it."""

    step: int
    predicted: float
    measured: float


def cuts(history: Iterable[Mapping[str, Any]]) -> list[Cut]:
    """Every cut of a `history.jsonl` of which both changes are known and finite, in order."""
    found: dict[tuple[int, int], Cut] = {}
    for record in history:
        predicted, measured = record.get("predicted_change"), record.get("measured_change")
        if predicted is not None and measured is not None and math.isfinite(predicted - measured):
            found[record["step"], record["round"]] = Cut(record["step"], predicted, measured)
    return list(found.values())


def calibration(history: Sequence[Removal], compensated: bool) -> float:
    """What predictions of the next cut are to be multiplied by: measured over predicted change of the cuts so far.

    Single scores are added up as if neurons did not meet, and a run's own cuts tell by how much that is off. Both are
    sums over cuts, in which a large cut says more than a small one and each counts half as much as the next. 1 before
    there is a cut of which both changes are known and positive.

    Args:
        history: of a run so far.
        compensated: whether survivors of the next cut are; cuts of the other kind tell nothing.
    """
    predicted = measured = 0.0
    seen: set[tuple[int, int]] = set()
    for record in history:
        p, m = record.predicted_change or 0.0, record.measured_change or 0.0
        is_alike = record.compensated == compensated and (record.step, record.round) not in seen
        if p > 0 and m > 0 and is_alike:
            seen.add((record.step, record.round))
            predicted, measured = _DECAY * predicted + p / record.calibration, _DECAY * measured + m
    return min(max(measured / predicted, 1 / _MOST), _MOST) if predicted > 0 else 1.0


def predicted_vs_measured(history: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """How well predicted and measured changes of the loss agree over the cuts of a run.

    Returns:
        cuts: how many both are known of; predicted_sum, measured_sum: over them; median_ratio: of measured over
        predicted, where both are positive, without the first cut, whose prediction nothing has calibrated, None without
        another; pearson, spearman: correlation over the cuts, None below 3 or where one side never varies.

    Example:
        >>> predicted_vs_measured([{"step": 9, "round": 0, "predicted_change": 0.5, "measured_change": 0.25}])["cuts"]
        1
    """
    pairs = cuts(history)
    predicted, measured = [cut.predicted for cut in pairs], [cut.measured for cut in pairs]
    ratios = [m / p for p, m in zip(predicted[1:], measured[1:]) if p > 0 and m > 0]
    return {
        "cuts": len(pairs),
        "predicted_sum": math.fsum(predicted),
        "measured_sum": math.fsum(measured),
        "median_ratio": statistics.median(ratios) if ratios else None,
        "pearson": pearson(predicted, measured),
        "spearman": pearson(ranks(predicted), ranks(measured)),
    }


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Correlation of two equally long sequences; None below 3 values or where one is constant."""
    if len(x) < _LEAST_CUTS:
        return None
    dx, dy = ([value - math.fsum(values) / len(values) for value in values] for values in (x, y))
    scale = math.sqrt(math.fsum(d * d for d in dx)) * math.sqrt(math.fsum(d * d for d in dy))
    if min(max(x) - min(x), max(y) - min(y), scale) == 0.0:
        return None
    return max(-1.0, min(1.0, math.fsum(a * b for a, b in zip(dx, dy)) / scale))


def ranks(values: Sequence[float]) -> list[float]:
    """Rank of each value from 1; equal values share the mean of their ranks."""
    return [
        (sum(other < value for other in values) + sum(other <= value for other in values) + 1) / 2 for value in values
    ]


def in_words(figures: Mapping[str, Any]) -> str:
    """What `predicted_vs_measured` found, for people."""
    if not figures["cuts"]:
        return "no cut has both a predicted and a measured change of the loss"
    predicted, measured = figures["predicted_sum"], figures["measured_sum"]
    count = "1 cut" if figures["cuts"] == 1 else f"{figures['cuts']} cuts"
    sums = f"{count}: loss predicted {predicted:+.3g}, measured {measured:+.3g}"
    if predicted > 0 and measured > 0:
        sums += f" ({measured / predicted:.2g} times as much)"
    rank = figures["spearman"]
    if rank is None or figures["pearson"] is None:
        return f"{sums}; too few for a correlation"
    rank = round(rank, 2)
    kind = "closely" if rank >= 0.9 else "well" if rank >= 0.7 else "roughly" if rank >= 0.4 else "hardly"
    return f"{sums}; ranked {kind} alike (Spearman {rank:.2f}, Pearson {figures['pearson']:.2f})"
