"""What the terminal shows while a run goes on: a live display, or plain lines where nobody is watching."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flatprune.pruning.predicted_vs_measured import in_words
from flatprune.pruning.targets import UNITS, amount
from flatprune.training.trainer import Observer

if TYPE_CHECKING:
    from flatprune.training.trainer import Trainer

_SPARKS = "▁▂▃▄▅▆▇█"
_SPARK_LENGTH = 48
_REFRESH_SECONDS = 0.1
_DEVICE_REFRESH_SECONDS = 1.0  # where the figures have to come from a GPU, which has to finish what is queued first
_FIGURE_STYLE = "bold"
_COMPARED = {"dense": "dense", "no_flatness": "no flatness term"}  # name in `summary.json` -> column


def observer(console: Console, title: str) -> Observer:
    """The display that suits the console: `LiveDisplay` for a terminal, `PlainLines` for a file or a pipe."""
    return LiveDisplay(console, title) if console.is_terminal else PlainLines(console, title)


class SteadyConsole(Console):
    """A console that falls silent once it cannot be written to: a run goes on without terminal, pipe or disk."""

    def on_broken_pipe(self) -> None:
        """Instead of ending the process, as rich does."""
        self.quiet = True

    def print(self, *objects: Any, **options: Any) -> None:
        """As `Console.print`."""
        try:
            super().print(*objects, **options)
        except (OSError, ValueError):  # ValueError: of a stream that is closed
            self.quiet = True

    def __exit__(self, *exception: Any) -> None:
        try:
            super().__exit__(*exception)
        except (OSError, ValueError):
            self.quiet = True


class Clock:
    """Time left, from the speed of the recent steps."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int]] = deque(maxlen=200)

    def left(self, step: int, total: int) -> float:
        """Seconds left after `step` of `total`; to be called after every step."""
        self._marks.append((time.monotonic(), step))
        (start, first), (now, last) = self._marks[0], self._marks[-1]
        return (now - start) / max(1, last - first) * (total - step)


class PlainLines(Observer):
    """One line an epoch, and one for whatever is out of the ordinary at a removal event."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._clock = Clock()
        self._left = 0.0
        self._epochs = 0

    def start(self, trainer: Trainer) -> None:
        """Say what begins or goes on."""
        self._epochs = trainer.settings.epochs
        self._print(describe(trainer, self._title))

    def step(self, trainer: Trainer) -> None:
        """Keep the time."""
        self._left = self._clock.left(trainer.progress.step, trainer.total_steps)

    def removal(self, record: dict[str, Any]) -> None:
        """Say what an event left undone."""
        if record["note"]:
            self._print(f"step {record['step']}: {record['note']}")

    def epoch(self, record: dict[str, Any]) -> None:
        """Print the epoch's figures."""
        test = record["test_accuracy"]
        self._print(
            f"epoch {record['epoch']:>{len(str(self._epochs))}}/{self._epochs}"
            f"  loss {record['train_loss']:.4f}"
            f"  train {record['train_accuracy']:6.2f} %"
            f"  test {'not done' if test is None else f'{test:6.2f} %'}"
            f"  parameters {record['params']:,} ({100.0 * record['params_fraction']:.1f} %)"
            f"  radius {record['spectral_radius']:.3g}"
            f"  left {duration(self._left)}"
        )

    def _print(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)


class LiveDisplay(Observer):
    """A bar, the figures of the moment, and small curves of accuracy, size and spectral radius."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._clock = Clock()
        self._live: Live | None = None
        self._trainer: Trainer | None = None
        self._shown = 0.0
        self._records: list[dict[str, Any]] = []
        self._cut: list[dict[str, Any]] = []  # records of the last cut

    def start(self, trainer: Trainer) -> None:
        """Open the display, with the curves of what was done before."""
        self._trainer = trainer
        self._records = [record for record in trainer.history if record["kind"] == "epoch"]
        self._cut = []
        for record in trainer.history:
            self._add_removal(record)
        self._console.print(Text(describe(trainer, self._title), style="bold"))
        self._live = Live(self._view(trainer, 0.0), console=self._console, auto_refresh=False)
        self._live.start()

    def step(self, trainer: Trainer) -> None:
        """Draw again, ten times a second at most, on a GPU once a second."""
        left = self._clock.left(trainer.progress.step, trainer.total_steps)
        now = time.monotonic()
        pause = _REFRESH_SECONDS if trainer.watch.is_free else _DEVICE_REFRESH_SECONDS
        if self._live is not None and now - self._shown > pause:
            self._shown = now
            self._live.update(self._view(trainer, left), refresh=True)

    def removal(self, record: dict[str, Any]) -> None:
        """Show the cut; what is out of the ordinary stays above the display."""
        self._add_removal(record)
        if record["note"]:
            self._console.print(Text(f"step {record['step']}: {record['note']}", style="yellow"))

    def _add_removal(self, record: dict[str, Any]) -> None:
        if record["kind"] != "removal":
            return
        same = self._cut and (self._cut[-1]["step"], self._cut[-1]["round"]) == (record["step"], record["round"])
        self._cut = [*self._cut, record] if same else [record]

    def epoch(self, record: dict[str, Any]) -> None:
        """Add a point to the curves."""
        self._records.append(record)

    def stop(self) -> None:
        """Leave the last picture standing."""
        if self._live is not None and self._trainer is not None:
            self._live.update(self._view(self._trainer, 0.0), refresh=True)
            self._live.stop()

    def _view(self, trainer: Trainer, left: float) -> Group:
        progress, total = trainer.progress, trainer.total_steps
        head = Table.grid(padding=(0, 2))
        head.add_row(
            ProgressBar(total=total, completed=progress.step, width=40),
            Text(f"epoch {min(progress.epoch + 1, trainer.settings.epochs)}/{trainer.settings.epochs}"),
            Text(phase(trainer), style="dim"),
            Text(f"{duration(left)} left", style="dim"),
        )
        rows = Table.grid(padding=(0, 2))
        rows.add_column(style="dim")
        rows.add_column(justify="right", min_width=9)
        rows.add_column(min_width=18)
        rows.add_column(no_wrap=True, overflow="crop")
        for row in self._rows(trainer):
            rows.add_row(*row)
        return Group(head, rows)

    def _rows(self, trainer: Trainer) -> list[tuple[str, Text, Text, Text]]:
        params = trainer.params
        last = self._records[-1] if self._records else {}
        loss, train = last.get("train_loss"), last.get("train_accuracy")
        if trainer.sums.seen:
            loss, train = trainer.sums.figures()
        left = 100.0 * params / trainer.params_before
        return [
            ("loss", _figure(loss, ".4f"), _note(""), self._curve("train_loss", "yellow")),
            (
                "accuracy",
                _figure(self._last_test(), ".2f", " %"),
                _note("" if train is None else f"train {train:.2f} %"),
                self._curve("test_accuracy", "blue"),
            ),
            (
                "parameters",
                _figure(left, ".1f", " %"),
                _note(f"{params:,}"),
                self._curve("params", "cyan", floor=0.0),
            ),
            *_target_row(trainer),
            (
                "radius",
                _figure(last.get("spectral_radius"), ".3g"),
                _note("K-FAC"),
                self._curve("spectral_radius", "magenta"),
            ),
            *self._cut_row(),
        ]

    def _cut_row(self) -> list[tuple[str, Text, Text, Text]]:
        """The last cut: when, how many neurons, what it was to do to the loss and did."""
        if not self._cut:
            return []
        neurons, last = sum(record["removed"] for record in self._cut), self._cut[-1]
        change = ", ".join(
            f"{word} {last[key]:+.3g}"
            for word, key in (("predicted", "predicted_change"), ("measured", "measured_change"))
            if last[key] is not None
        )
        return [("last cut", _figure(neurons, ","), _note(f"neurons, step {last['step']}"), _note(f"loss {change}"))]

    def _curve(self, key: str, color: str, floor: float | None = None) -> Text:
        known = [record[key] for record in self._records if record[key] is not None]
        return Text(sparkline(known, floor), style=color)

    def _last_test(self) -> float | None:
        return next((r["test_accuracy"] for r in reversed(self._records) if r["test_accuracy"] is not None), None)


def describe(trainer: Trainer, title: str) -> str:
    """The line above a run."""
    settings, target = trainer.settings, trainer.settings.target
    unit = "them" if target.unit == "params" else f"the {UNITS[target.unit]}"
    goal = "without pruning" if target.fraction >= 1.0 else f"to {100.0 * target.fraction:g} % of {unit}"
    begun = f", going on at epoch {trainer.progress.epoch + 1}" if trainer.progress.step else ""
    return (
        f"{title}: {settings.model} on {settings.data}, {len(trainer.dataset.x_train):,} images, "
        f"{trainer.params_before:,} parameters {goal}, seed {settings.seed}{begun}"
    )


def phase(trainer: Trainer) -> str:
    """What the step in hand is part of, by the schedule's events: the first begins pruning, the last ends it."""
    pruner = trainer.pruner
    if pruner is None:
        return "training"
    if pruner.stopped:
        return "pruning stopped"
    events = pruner.schedule.events
    done = sum(event <= pruner.step_count for event in events)
    return "training" if done == 0 else "settling" if done == len(events) else f"pruning, event {done} of {len(events)}"


def sparkline(values: list[float], floor: float | None = None) -> str:
    """Values as a row of block characters, the newest last, thinned out to at most 48."""
    if not values:
        return ""
    stride = -(-len(values) // _SPARK_LENGTH)
    kept = values[::-1][::stride][::-1]
    low = min(kept) if floor is None else floor
    span = max(max(kept) - low, 1e-12)
    return "".join(_SPARKS[min(7, int(8 * (value - low) / span))] for value in kept)


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def print_summary(console: Console, summary: dict[str, Any], folder: str) -> None:
    """The result as a table (with a column for each network that it is compared with), and where the files are."""
    compared = [name for name in _COMPARED if f"{name}_test_accuracy_last" in summary]
    pruned = summary["target_fraction"] < 1.0
    columns = compared if "dense" in compared or not pruned else ["before", *compared]
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("")
    for name in columns:
        table.add_column(_COMPARED.get(name, name), justify="right")
    table.add_column("pruned" if pruned else "result", justify="right", style=_FIGURE_STYLE)
    for name, cells, after in _summary_rows(summary):
        table.add_row(name, *(cells.get(column, "") for column in columns), after)
    console.print()
    console.print(table)
    console.print()
    for line in remarks(summary):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if "traffic" in summary:
        console.print(traffic_table(summary["traffic"]))
        console.print()
    console.print(f"results in {folder}", soft_wrap=True, highlight=False, markup=False)


def traffic_table(traffic: dict[str, dict[str, Any]]) -> Table:
    """What the first of several processes has told the others, by purpose."""
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("told to the other processes")
    for name in ("calls", "MB", "waited"):
        table.add_column(name, justify="right")
    for purpose, entry in traffic.items():
        waited = "" if entry["seconds"] is None else f"{entry['seconds']:.2f} s"
        table.add_row(purpose, f"{entry['calls']:,}", f"{entry['bytes'] / 1e6:,.2f}", waited)
    return table


def remarks(summary: dict[str, Any]) -> list[str]:
    """What the table does not show: why pruning stopped, and whether the criterion's predictions came true."""
    lines = []
    if summary["pruning_stopped"]:
        lines.append(f"pruning stopped: {summary['pruning_stopped']}")
    if summary["predicted_vs_measured"]["cuts"]:
        lines.append(f"predicted and measured: {in_words(summary['predicted_vs_measured'])}")
    return lines


def _summary_rows(summary: dict[str, Any]) -> list[tuple[str, dict[str, str], str]]:
    """Name of a figure, column -> what it was there, what it is."""

    def row(name: str, key: str, form: str, unit: str = "") -> tuple[str, dict[str, str], str]:
        return (name, beside(key, form, unit), f"{summary[key]:{form}}{unit}")

    def beside(key: str, form: str, unit: str = "") -> dict[str, str]:
        keys = {other: f"{other}_{key}" for other in _COMPARED}
        return {other: f"{summary[k]:{form}}{unit}" for other, k in keys.items() if k in summary}

    def change(name: str, before: str, after: str, others: dict[str, str]) -> tuple[str, dict[str, str], str]:
        return (name, {**others, "before": before, "dense": before}, after)

    def size(name: str, key: str) -> tuple[str, dict[str, str], str]:
        before, after = summary[f"{key}_before"], summary[f"{key}_after"]
        return change(name, f"{before:,}", f"{after:,} ({100.0 * after / before:.1f} %)", beside(key, ","))

    unit = summary["target_unit"]
    more = []
    if unit in ("neurons", "latency") and summary["cost_before"] is not None:
        before, after = (amount(unit, summary[f"cost_{when}"]) for when in ("before", "after"))
        left = 100.0 * summary["cost_after"] / summary["cost_before"]
        more.append(change(UNITS[unit], before, f"{after} ({left:.1f} %)", {}))
    if "latency_after_1" in summary:
        before, after = (f"{summary[f'latency_{when}_1']:.3g} ms" for when in ("before", "after"))
        more.append(change("latency of one image", before, after, beside("latency_1", ".3g", " ms")))
    return [
        row("test accuracy, last epoch", "test_accuracy_last", ".2f", " %"),
        row("test accuracy, best epoch", "test_accuracy_best", ".2f", " %"),
        row("training accuracy", "train_accuracy_last", ".2f", " %"),
        size("parameters", "params"),
        size("multiply-accumulates", "macs"),
        *more,
        *([row("largest Hessian eigenvalue", "hessian_lambda_max", ".3g")] if "hessian_lambda_max" in summary else []),
        row("spectral radius, K-FAC", "spectral_radius_kfac", ".3g"),
        row("training time", "seconds", ".1f", " s"),
        *([row("  removals of it", "removal_seconds", ".1f", " s")] if summary["removal_seconds"] else []),
    ]


def _target_row(trainer: Trainer) -> list[tuple[str, Text, Text, Text]]:
    """What is left in the unit of the target, where that is not parameters."""
    pruner = trainer.pruner
    if pruner is None or pruner.target.unit == "params":
        return []
    unit, cost = pruner.target.unit, pruner.cost
    return [(UNITS[unit], _figure(100.0 * cost / pruner.cost_start, ".1f", " %"), _note(amount(unit, cost)), _note(""))]


def _figure(value: float | None, form: str, unit: str = "") -> Text:
    return Text("" if value is None else f"{value:{form}}{unit}", style=_FIGURE_STYLE)


def _note(text: str) -> Text:
    return Text(text, style="dim")
