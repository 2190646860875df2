"""The tables of docs/results.md: a row for each method and setting, paired differences to ours."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from bench.rivals.method import Method, is_installed
from bench.rivals.plan import Folder, runs_of
from bench.rivals.tasks import TASKS, TITLES
from flatprune.study.results import Statistic
from flatprune.study.tables import Table

REFERENCE = "ours"
FIGURES = {  # key -> column and form
    "accuracy": ("test accuracy, %", ".2f"),
    "nll": ("NLL", ".3f"),
    "ece": ("ECE", ".3f"),
    "train_accuracy": ("training accuracy, %", ".1f"),
    "params": ("parameters", ",.0f"),
    "macs": ("multiply-accumulates", ",.0f"),
    "seconds": ("training, s", ".1f"),
    "latency_1": ("one image, ms", ".3f"),
    "latency_128": ("128 images, ms", ".2f"),
    "rss_peak": ("peak memory, MiB", ".0f"),
}
_PAIRED = "less ours, points"
Outcome = dict[str, Any]


class Row(NamedTuple):
    """A method with a setting.

    Attributes:
        title: of the method.
        setting: as in "lr 0.1", with "tuned" where it was chosen.
        outcomes: seed -> what became of the run, or None while it has not been run.
        missing: why nothing can be run.
    """

    title: str
    setting: str
    outcomes: dict[int, Outcome | None]
    missing: str = ""


def tables(
    folder: Folder,
    methods: dict[str, type[Method]],
    tasks: Sequence[str],
    targets: Sequence[str],
    seeds: Sequence[int],
    tuning_seeds: Sequence[int],
) -> Iterator[Table]:
    """One for each task and size of which anything was run."""
    for task in tasks:
        for target in targets:
            rows = [row for item in methods.items() for row in _rows(folder, task, target, *item, seeds, tuning_seeds)]
            if any(outcome for row in rows for outcome in row.outcomes.values()):
                yield table(f"{TASKS[task].title}: {TITLES[target]}", rows, *_references(rows, methods))


def _rows(
    folder: Folder,
    task: str,
    target: str,
    name: str,
    method: type[Method],
    seeds: Sequence[int],
    tuning_seeds: Sequence[int],
) -> Iterator[Row]:
    best = folder.best_value(task, target, name, method, tuning_seeds) if tuning_seeds else None
    for value, word in ((method.knob.recommended, ""), (best, ", tuned")):
        if value is None:
            continue
        runs = runs_of(task, target, name, method, value, seeds, tuning=False)
        outcomes = {run.seed: folder.outcome(run) for run in runs}
        absent = not is_installed(method) and not any(outcomes.values())
        why = f"not run: {method.distribution} is not installed" if absent else ""
        yield Row(method.title, f"{method.knob.name} {value}{word}", outcomes, why)


def _references(rows: Sequence[Row], methods: dict[str, type[Method]]) -> tuple[Row | None, Row | None]:
    """Ours as recommended, which settings as recommended are compared with, and ours tuned, which tuned ones are."""
    ours = [row for row in rows if REFERENCE in methods and row.title == methods[REFERENCE].title]
    return (ours[0] if ours else None, ours[1] if len(ours) > 1 else None)


def table(title: str, rows: Sequence[Row], recommended: Row | None, tuned: Row | None) -> Table:
    """Mean and standard deviation over the seeds that ended; of differences by seed mean and standard error."""
    accuracy, *others = FIGURES
    head = ("method", "setting", "n", FIGURES[accuracy][0], _PAIRED, *(FIGURES[key][0] for key in others))
    cells = []
    for row in rows:
        reference = tuned if row.setting.endswith("tuned") else recommended
        compared = (_figure(row, accuracy), _difference(row, reference))
        cells.append((row.title, row.setting, _count(row), *compared, *(_figure(row, key) for key in others)))
    return Table(title, head, tuple(cells), left=2)


def _ended(row: Row) -> dict[int, Outcome]:
    return {seed: outcome for seed, outcome in row.outcomes.items() if outcome and outcome["status"] == "ended"}


def _count(row: Row) -> str:
    """How many runs the figures are of, and what became of all others."""
    if row.missing:
        return row.missing
    states = [outcome["status"] if outcome else "not run" for outcome in row.outcomes.values()]
    others = [state for state in ("diverged", "failed", "not run") if state in states]
    parts = [f"{states.count(state)} of {len(states)} {state}" for state in others]
    return "; ".join([str(states.count("ended")), *parts])


def _figure(row: Row, key: str) -> str:
    found = [outcome[key] for outcome in _ended(row).values() if outcome.get(key) is not None]
    if not found:
        return ""
    spread = statistics.stdev(found) if len(found) > 1 and key in ("accuracy", "nll", "ece", "params") else None
    return Statistic(statistics.fmean(found), spread, len(found)).text(FIGURES[key][1])


def _difference(row: Row, reference: Row | None) -> str:
    """Of the accuracies by seed, over the seeds that both have."""
    if reference is None or row is reference:
        return ""
    own, theirs = _ended(row), _ended(reference)
    found = [own[seed]["accuracy"] - theirs[seed]["accuracy"] for seed in own if seed in theirs]
    if not found:
        return ""
    error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else None
    return Statistic(statistics.fmean(found), error, len(found)).text("+.2f").replace("± +", "± ")


def section(shown: Sequence[Table], folder: Folder, command: str, seeds: Sequence[int], tuning: Sequence[int]) -> str:
    """Command, versions, seeds and tables, Markdown."""
    stamp = folder.stamp
    versions = ", ".join(f"{name} {version}" for name, version in stamp["versions"].items() if version)
    tuned = any(row[1].endswith("tuned") for each in shown for row in each.rows)
    chosen = f"; knobs chosen on seeds {tuning[0]} to {tuning[-1]}" if tuned else "; nothing tuned yet"
    lines = [
        f"    {command}",
        "",
        f"{versions}; {stamp['cpu']}, one thread a run; commit {stamp['commit']}. "
        f"Seeds {seeds[0]} to {seeds[-1]}{chosen}. Seconds and milliseconds are of the CPU's own time.",
        "",
    ]
    for each in shown:
        lines += [f"**{each.title}**", "", each.markdown(), ""]
    return "\n".join(lines[:-1])
