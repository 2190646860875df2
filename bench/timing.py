"""Timing of several variants of one computation, on whatever device: alternating, medians and spread."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Variant = Callable[[], Any]
Stopwatch = Callable[[Variant, int], tuple[float, float | None]]
"""(call, how often) -> seconds of one call, and of all CPU threads where that means something"""

MIN_SAMPLE = 2e-3  # seconds: shorter calls are repeated within one sample, so that the clock's grain does not count
MAX_ROUNDS = 51
_LONG_CALL = 0.3
WIDE_SPREAD = 0.15  # of the median between the quartiles: said to be noisy above


@dataclass
class Samples:
    """Seconds of one call in every round; of `cpu` none where the stopwatch has none."""

    repeats: int = 1
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def wall_and_cpu(
    clock: Callable[[], float] = time.perf_counter, cpu_clock: Callable[[], float] = time.process_time
) -> Stopwatch:
    """The stopwatch of a CPU."""

    def measured(run: Variant, repeats: int) -> tuple[float, float]:
        cpu, wall = cpu_clock(), clock()
        for _ in range(repeats):
            run()
        return (clock() - wall) / repeats, (cpu_clock() - cpu) / repeats

    return measured


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def figures(seconds: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """Median, quartiles and minimum."""
    low, median, high = quartiles(seconds)
    return {"median": median * scale, "q1": low * scale, "q3": high * scale, "min": min(seconds) * scale}


class Alternation:
    """Runs all variants once a round, beginning with another one each round.

    Args:
        variants: name -> what is timed, in the process and on the inputs of all others.
        before: name -> what runs right before each sample of that variant, untimed (one call a sample then).
        stopwatch: how a call is timed.
    """

    def __init__(
        self,
        variants: Mapping[str, Variant],
        *,
        before: Mapping[str, Callable[[], Any]] | None = None,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self.variants, self.before = dict(variants), dict(before or {})
        self.stopwatch = stopwatch or wall_and_cpu()
        self.samples = {name: Samples() for name in self.variants}
        self._round = 0

    def calibrate(self, budget: float, min_rounds: int) -> int:
        """Untimed calls of each variant (caches, plans, thread pools); returns the rounds that fit the budget."""
        seconds = {}
        for name in self.variants:
            seconds[name] = self._sample(name, 1)[0]
            if seconds[name] < _LONG_CALL:  # a first call that was long was not so by its warm-up
                seconds[name] = self._sample(name, 1)[0]
        for name, value in seconds.items():
            if name not in self.before:
                self.samples[name].repeats = max(1, math.ceil(MIN_SAMPLE / max(value, 1e-7)))
        whole = sum(value * self.samples[name].repeats for name, value in seconds.items())
        return min(MAX_ROUNDS, max(min_rounds, int(budget / whole)))

    def round(self) -> None:
        """One sample of each variant."""
        names = list(self.variants)
        start = self._round % len(names)
        for name in names[start:] + names[:start]:
            samples = self.samples[name]
            wall, cpu = self._sample(name, samples.repeats)
            samples.wall.append(wall)
            if cpu is not None:
                samples.cpu.append(cpu)
        self._round += 1

    def rounds(self, most: int, seconds: float, fewest: int = 3) -> None:
        """Two untimed calls of each variant, then rounds; after so many seconds in all no more than the fewest."""
        end = time.monotonic() + seconds
        for run in self.variants.values():
            run()
            run()
        for done in range(most):
            if done >= fewest and time.monotonic() > end:
                break
            self.round()

    def _sample(self, name: str, repeats: int) -> tuple[float, float | None]:
        if name in self.before:
            self.before[name]()
        return self.stopwatch(self.variants[name], repeats)


def summary(samples: Samples, native: Samples | None, unit_scale: float = 1.0) -> dict[str, Any]:
    """Median, quartiles, minimum and, where there is one, CPU time of a variant; its ratio to native, round by round.

    `speedup` is the ratio of the medians; its quartiles are those of the ratios within a round, which a load that
    comes and goes disturbs less than the times.
    """
    found: dict[str, Any] = {**figures(samples.wall, unit_scale), "repeats": samples.repeats}
    if samples.cpu:
        found["cpu_median"] = statistics.median(samples.cpu) * unit_scale
    if native is not None:
        ratio_low, ratio, ratio_high = quartiles([a / b for a, b in zip(samples.wall, native.wall)])
        found |= {
            "speedup": statistics.median(samples.wall) / statistics.median(native.wall),
            "paired_speedup": ratio,
            "paired_q1": ratio_low,
            "paired_q3": ratio_high,
        }
    return found


def timed_case(
    suite: str, name: str, samples: Mapping[str, Samples], *, per: float = 1.0, **facts: Any
) -> dict[str, Any]:
    """An entry of a result document: the figures of each variant of a call that does `per` of what is meant."""
    native = samples.get("native")
    return {
        "suite": suite,
        "name": name,
        "kind": "time",
        "unit": "s",
        "rounds": len(next(iter(samples.values())).wall),
        **facts,
        "variants": {key: summary(value, native, 1 / per) for key, value in samples.items()},
    }


def spread(variant: Mapping[str, float]) -> float:
    """Distance of the quartiles as a part of the median."""
    return (variant["q3"] - variant["q1"]) / variant["median"]


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Slope of the least-squares line through (log x, log y): the power with which y grows."""
    return statistics.linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys]).slope
