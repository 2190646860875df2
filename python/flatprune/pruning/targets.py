"""How small a network shall become, and in which unit that is counted."""

from __future__ import annotations

from dataclasses import dataclass

UNITS = {
    "params": "parameters",
    "macs": "multiply-accumulates",
    "neurons": "neurons",
    "latency": "latency",
}


@dataclass(frozen=True)
class Target:
    """The size to reach: exactly one fraction in (0, 1] of what the network has at the start.

    Args:
        params: parameters left.
        macs: multiply-accumulates left, for one sample, of all matrix products and convolutions, an attention's between
            its own inputs too. They are counted by operator once, the rest is exact arithmetic on widths.
        neurons: neurons left, of those that can be pruned.
        latency: inference latency left, on the model's device, for `latency_batch` samples; how it is measured and
            modelled says `flatprune.pruning.latency`.
        latency_batch: samples in the forward whose latency counts.
        tolerance: how far above or below the target the network may end, as a part of it. Neurons are large, and of
            all that end so near the last ones are those of least loss.

    Raises:
        ValueError: none or several are given, or one is not in (0, 1]; `latency_batch` is below 1; `tolerance` is not
            in [0, 1).

    Example:
        >>> Target(params=0.1).goal(72666)
        7266
        >>> Target(macs=0.3).unit
        'macs'
    """

    params: float | None = None
    macs: float | None = None
    neurons: float | None = None
    latency: float | None = None
    latency_batch: int = 64
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        given = {unit: getattr(self, unit) for unit in UNITS if getattr(self, unit) is not None}
        if len(given) != 1:
            raise ValueError(f"Target: {' and '.join(given) or 'nothing'} given, expected one of {', '.join(UNITS)}")
        for unit, fraction in given.items():
            if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0.0 < fraction <= 1.0:
                raise ValueError(f"Target: {unit} is {fraction!r}, expected a number above 0 and at most 1")
        if isinstance(self.latency_batch, bool) or not isinstance(self.latency_batch, int) or self.latency_batch < 1:
            raise ValueError(f"Target: latency_batch is {self.latency_batch!r}, expected an integer of 1 or more")
        if not 0.0 <= self.tolerance < 1.0:
            raise ValueError(f"Target: tolerance is {self.tolerance!r}, expected a number from 0 to below 1")

    @property
    def unit(self) -> str:
        """Which of the fractions is given: "params", "macs", "neurons" or "latency"."""
        return next(unit for unit in UNITS if getattr(self, unit) is not None)

    @property
    def fraction(self) -> float:
        """The fraction that is given."""
        return float(getattr(self, self.unit))

    def goal(self, start: float) -> float:
        """The cost that is the target, for a network that costs `start`; whole but for latency (seconds)."""
        if self.unit == "latency":
            return self.fraction * start
        return int(self.fraction * start + 1e-6)  # 0.1 * 30 is a little above 3 only by rounding

    def range(self, start: float) -> tuple[float, float]:
        """The least and the largest cost that meet the target, for a network that costs `start`."""
        goal = self.goal(start)
        return goal * (1.0 - self.tolerance), goal * (1.0 + self.tolerance)


def amount(unit: str, cost: float) -> str:
    """A cost as people read it, for the name in `UNITS` to follow.

    Example:
        >>> amount("latency", 0.00123), amount("macs", 1200)
        ('1.23 ms', '1200')
    """
    return f"{1e3 * cost:.3g} ms" if unit == "latency" else f"{cost:.0f}"
