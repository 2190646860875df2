"""When neurons go and what the network may cost after each event."""

from __future__ import annotations

from dataclasses import dataclass, field

_EVERY, _EVENTS = 20, 25  # steps between events at least, and about how many events at most, unless told otherwise


@dataclass(frozen=True)
class CubicSchedule:
    """Removal events at equal distances, their budgets on a cubic (Zhu & Gupta 2017, arXiv 1710.01878).

    With p the fraction of the pruning phase that is over, the budget is
    `target + (start - target) (1 - p)^3`: fast at first, while much is redundant, slow at the end.

    Args:
        total_steps: optimizer steps of the whole training.
        start: fraction of the training after which pruning begins.
        end: fraction of the training at which the last event is.
        every: steps between events; the last one is exactly at `end`. None: 20, or as many as make about 25 events, so
            that a long training has no more of them than a short one.

    Raises:
        ValueError: naming the argument out of range.

    Example:
        >>> CubicSchedule(400).events
        (60, 80, 100, 120, 140, 160)
        >>> CubicSchedule(400).budget(160, start=72666, target=3633)
        3633
    """

    total_steps: int
    start: float = 0.1
    end: float = 0.4
    every: int | None = None
    events: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        if self.total_steps < 1:
            raise ValueError(f"CubicSchedule: total_steps is {self.total_steps}, expected 1 or more")
        if not 0.0 <= self.start <= self.end <= 1.0:
            raise ValueError(f"CubicSchedule: start {self.start} and end {self.end}, expected 0 <= start <= end <= 1")
        if self.every is not None and self.every < 1:
            raise ValueError(f"CubicSchedule: every is {self.every}, expected 1 or more")
        last = max(1, round(self.end * self.total_steps))
        phase = last - self.start * self.total_steps
        every = max(_EVERY, round(phase / _EVENTS)) if self.every is None else self.every
        count = max(1, round(phase / every))
        events = tuple(last - every * (count - 1 - i) for i in range(count))
        object.__setattr__(self, "events", events)

    def budget(self, step: int, start: float, target: float) -> float | None:
        """What the network may cost after the event at `step`, or None if there is no event.

        Args:
            step: optimizer steps taken, from 1.
            start: cost before pruning.
            target: cost after the last event; if both are integers (parameters, say), so is the budget.
        """
        if step not in self.events:
            return None
        progress = (self.events.index(step) + 1) / len(self.events)
        above = (start - target) * (1.0 - progress) ** 3
        return target + (int(above) if isinstance(start, int) and isinstance(target, int) else above)

    def is_last(self, step: int) -> bool:
        """Whether the event at `step` is the last one."""
        return step == self.events[-1]
