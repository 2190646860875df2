"""How long the runs that are left will take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flatprune.execution import Running
from flatprune.settings import Settings


class Pace:
    """Time left, from the seconds a step took in runs of the same kind, or in all where there was none yet."""

    def __init__(self) -> None:
        self._made: dict[Any, tuple[int, float]] = {}  # kind -> steps and seconds

    def note(self, settings: Settings, steps: int, seconds: float) -> None:
        """Learn from a run that has ended."""
        _add(self._made, _kind(settings), steps, seconds)

    def left(self, unmade: Iterable[tuple[Settings, int]], running: list[Running]) -> float | None:
        """Seconds until all is made.

        Args:
            unmade: settings and steps of all runs that have not ended.
            running: those of them that are being made, as many at once as now.

        Returns:
            None as long as no step has been timed.
        """
        made = dict(self._made)
        begun = [(run, run.steps) for run in running if run.steps is not None]
        for run, steps in begun:
            _add(made, _kind(run.settings), steps.step - steps.first, steps.seconds)
        all_steps, all_seconds = (sum(column) for column in zip(*made.values())) if made else (0, 0.0)
        if not all_steps:
            return None

        def pace(settings: Settings) -> float:
            steps, seconds = made.get(_kind(settings), (0, 0.0))
            return seconds / steps if steps else all_seconds / all_steps

        total = sum(steps * pace(settings) for settings, steps in unmade)
        total -= sum(steps.step * pace(run.settings) for run, steps in begun)
        return max(0.0, total / max(1, len(begun)))


def _add(made: dict[Any, tuple[int, float]], kind: Any, steps: int, seconds: float) -> None:
    before = made.get(kind, (0, 0.0))
    made[kind] = before[0] + steps, before[1] + seconds


def _kind(settings: Settings) -> Any:
    return settings.data, settings.model, settings.widths, settings.image_size, settings.batch_size, settings.flatness
