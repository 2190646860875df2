"""What the terminal shows while many runs are made: a live display, or a line a run where nobody is watching."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flatprune.reporting.progress import duration

_REFRESH_SECONDS = 0.2


@dataclass(frozen=True)
class Standing:
    """How far the whole is.

    Attributes:
        done, total: runs.
        running: (name, steps done, steps) of those that are being made.
        left: seconds, or None as long as nobody can tell.
    """

    done: int
    total: int
    running: list[tuple[str, int, int]]
    left: float | None

    @property
    def time_left(self) -> str:
        """For people."""
        return "" if self.left is None else f"{duration(self.left)} left"


class Display:
    """One line a run."""

    def __init__(self, console: Console, title: str, what: str) -> None:
        self.console, self.title, self.what = console, title, what

    def start(self, standing: Standing) -> None:
        """The whole begins or goes on."""
        begun = f", {standing.done} done already" if standing.done else ""
        self._print(f"{self.title}: {standing.total} {self.what}{begun}")

    def show(self, standing: Standing) -> None:
        """Called many times a second."""

    def ended(self, name: str, result: str, seconds: float, standing: Standing) -> None:
        """A run ended; `result` says how, in a few words."""
        width = len(str(standing.total))
        place = f"{standing.done:>{width}}/{standing.total}"
        self._print("  ".join(filter(None, (place, name, result, duration(seconds), standing.time_left))))

    def stop(self, standing: Standing) -> None:
        """The whole ended or was stopped."""

    def _print(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)


class LiveDisplay(Display):
    """Bars for the whole and for every run that is being made, below the lines of those that ended."""

    def start(self, standing: Standing) -> None:
        """Open the display."""
        super().start(standing)
        self._shown = 0.0
        self._live = Live(self._view(standing), console=self.console, auto_refresh=False, transient=True)
        self._live.start()

    def show(self, standing: Standing) -> None:
        """Draw again, five times a second at most."""
        if time.monotonic() - self._shown > _REFRESH_SECONDS:
            self._shown = time.monotonic()
            self._live.update(self._view(standing), refresh=True)

    def stop(self, standing: Standing) -> None:
        """Close the display; the lines stay."""
        self._live.stop()

    def _view(self, standing: Standing) -> Group:
        rows = Table.grid(padding=(0, 2))
        part = sum(step / total for _, step, total in standing.running if total)
        rows.add_row(
            ProgressBar(total=max(1, standing.total), completed=standing.done + part, width=40),
            Text(f"{standing.done}/{standing.total} {self.what}", style="bold"),
            Text(standing.time_left, style="dim"),
        )
        for name, step, total in standing.running:
            bar = ProgressBar(total=max(1, total), completed=step, width=40)
            rows.add_row(bar, Text(name, overflow="ellipsis", no_wrap=True), Text(f"{step}/{total}", style="dim"))
        return Group(rows)


def display_for(console: Console, title: str, what: str = "runs") -> Display:
    """The display that suits the console, of so many things of a kind."""
    return (LiveDisplay if console.is_terminal else Display)(console, title, what)
