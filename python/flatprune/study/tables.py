"""Tables of a study: for the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from flatprune.study.results import BY_KEY, METRICS, Group, Results

MAIN = "test_accuracy_last"
DETAILS = (
    *(MAIN, "test_accuracy_best", "gap", "test_nll", "test_ece"),
    *("corrupted_accuracy_mean", "corrupted_noise", "corrupted_blur", "corrupted_contrast"),
    *(
        "params_left",
        "macs_left",
        "hessian_lambda_max",
        "spectral_radius_kfac",
        "latency_after_1",
        "latency_after_128",
    ),
    "seconds",
)


@dataclass(frozen=True)
class Table:
    """A table as text.

    Attributes:
        title: what it shows.
        head: names of the columns; the first `left` ones hold words.
        rows: cells.
        left: how many columns are words.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1

    def markdown(self) -> str:
        """The table in Markdown, without its title."""
        rule = ["---"] * self.left + ["---:"] * (len(self.head) - self.left)
        lines = [[_markdown_cell(cell) for cell in row] for row in (self.head, rule, *self.rows)]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def show(self, console: Console) -> None:
        """Print it."""
        table = RichTable(
            title=Text(self.title), title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="dim"
        )
        for place, name in enumerate(self.head):
            table.add_column(Text(name), justify="left" if place < self.left else "right")
        for row in self.rows:
            table.add_row(*map(Text, row))
        console.print(table)


def _markdown_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def sections(results: Results) -> list[tuple[str, list[Group]]]:
    """The groups at equal values of all axes but the first, which runs along a table or a plot."""
    found: dict[str, list[Group]] = {}
    for group in results.groups:
        name = ", ".join(f"{axis} {value}" for axis, value in group.point[1:])
        found.setdefault(name, []).append(group)
    return list(found.items())


def overview(results: Results, key: str = MAIN) -> list[Table]:
    """One figure, variants downwards and the first axis of the grid to the right; a table for each section."""
    return _across(results, key, "mean ± standard deviation (n)", lambda group: _cell(group, key))


def differences(results: Results, key: str = MAIN) -> list[Table]:
    """The same figure less that of the study's reference, paired by seed; no table where there is no reference."""
    reference, metric = results.study.reference, BY_KEY[key]
    if reference is None:
        return []

    def cell(group: Group) -> str:
        value = results.difference(group, key)
        return "" if value is None else f"{value.text(f'+{metric.form}')} ({value.n})".replace("± +", "± ")

    others = [group for group in results.groups if group.variant != reference]
    return _across(results, key, f"less that of {reference!r} by seed, mean ± standard error (n)", cell, others)


def _across(
    results: Results, key: str, what: str, cell: Callable[[Group], str], shown: Sequence[Group] | None = None
) -> list[Table]:
    metric = BY_KEY[key]
    axis = next(iter(results.study.axes), None)
    tables = []
    for name, groups in sections(results):
        groups = [group for group in groups if shown is None or group in shown]
        columns = results.study.axes[axis] if axis is not None else ("",)
        rows = []
        for variant in dict.fromkeys(group.variant for group in groups):
            own = {group.point[0][1] if group.point else "": group for group in groups if group.variant == variant}
            rows.append((variant, *(cell(own[column]) if column in own else "" for column in columns)))
        head = ("", *(f"{axis} {column}" if axis is not None else metric.title for column in columns))
        title = ": ".join(filter(None, (name, f"{metric.title}, {what}")))
        tables.append(Table(title, head, tuple(rows)))
    return tables


def details(results: Results, keys: Sequence[str] = DETAILS) -> Table:
    """All groups downwards, their figures to the right."""
    metrics = results.present(keys)
    axes = tuple(results.study.axes)
    tuned = any(group.chosen for group in results.groups)
    rows = []
    for group in results.groups:
        found = [group.statistic(metric.key) for metric in metrics]
        cells = ["" if value is None else value.text(metric.form) for metric, value in zip(metrics, found)]
        words = [group.variant, *dict(group.point).values(), *([group.chosen] if tuned else []), group.state]
        rows.append((*words, str(len(group.summaries)), *cells))
    head = ("variant", *axes, *(["chosen"] if tuned else []), "state", "n", *(metric.title for metric in metrics))
    return Table("All figures, mean ± standard deviation", head, tuple(rows), left=len(axes) + 2 + tuned)


def markdown(results: Results) -> str:
    """All tables."""
    tables = [*overview(results), *differences(results), *_correlations(results), details(results)]
    return "\n\n".join(f"**{table.title}**\n\n{table.markdown()}" for table in tables) + "\n"


def _correlations(results: Results) -> list[Table]:
    keys = [metric.key for metric in METRICS if metric.key.startswith("spearman_")]
    if not results.present(keys):
        return []
    table = details(results, keys)
    return [Table("Rank correlation with the true λmax over training", table.head, table.rows, table.left)]


def groups_csv(results: Results) -> str:
    """A line a group: mean, standard deviation and n of every figure."""
    metrics = results.present(BY_KEY)
    head = ["variant", *results.study.axes, "chosen", "state"]
    head += [f"{metric.key}_{part}" for metric in metrics for part in ("mean", "sd", "n")]
    lines = []
    for group in results.groups:
        cells: list[object] = [group.variant, *dict(group.point).values(), group.chosen, group.state]
        for metric in metrics:
            value = group.statistic(metric.key)
            cells += ["", "", 0] if value is None else [value.mean, "" if value.n < 2 else value.deviation, value.n]
        lines.append(cells)
    return _csv(head, lines)


def runs_csv(results: Results) -> str:
    """A line a run that ended: every figure, and the folder it is in."""
    metrics = results.present(BY_KEY)
    head = ["variant", *results.study.axes, "seed", *(metric.key for metric in metrics), "folder"]
    lines = [
        [
            *(group.variant, *dict(group.point).values(), seed),
            *(metric.value(summary) for metric in metrics),
            group.folders[seed].name,
        ]
        for group in results.groups
        for seed, summary in group.summaries.items()
    ]
    return _csv(head, lines)


def groups_record(results: Results) -> list[dict[str, object]]:
    """The groups as plain values: figure -> mean, standard deviation (None for one seed) and n."""
    return [
        {
            "variant": group.variant,
            "point": dict(group.point),
            "chosen": group.chosen,
            "state": group.state,
            "figures": {
                metric.key: value._asdict()
                for metric in results.present(BY_KEY)
                if (value := group.statistic(metric.key)) is not None
            },
        }
        for group in results.groups
    ]


def _cell(group: Group, key: str) -> str:
    value = group.statistic(key)
    text = "" if value is None else f"{value.text(BY_KEY[key].form)} ({value.n})"
    return "; ".join(filter(None, (text, group.state)))


def _csv(head: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(lines)
    return buffer.getvalue()
