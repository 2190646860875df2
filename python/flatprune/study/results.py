"""What a study found: the figures of every run, and their means over the seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from flatprune.execution import DIVERGED
from flatprune.files.finished import HISTORY_FILE, read_history
from flatprune.study.grid import Cell, Point
from flatprune.study.plan import Plan
from flatprune.training.corruptions import KINDS

Summary = dict[str, Any]
TRACKED = (
    "spectral_radius",
    "spectral_radius_geometric_mean",
    "radius_reduce",
    "radius_reduce_geometric_mean",
    "radius_expand",
    "radius_expand_geometric_mean",
)


class Metric(NamedTuple):
    """A figure of a run.

    Attributes:
        key: column of the CSV files.
        title: for people, with the unit.
        form: how its mean is written.
        value: takes it from a summary; None where the run has no such figure.
    """

    key: str
    title: str
    form: str
    value: Callable[[Summary], float | None]


def _plain(key: str, title: str, form: str) -> Metric:
    return Metric(key, title, form, lambda summary: summary.get(key))


def _fraction(key: str, title: str) -> Metric:
    def value(summary: Summary) -> float:
        return 100.0 * summary[f"{key}_after"] / summary[f"{key}_before"]

    return Metric(f"{key}_left", title, ".1f", value)


def _corrupted(kind: str) -> Metric:
    def value(summary: Summary) -> float | None:
        found = summary.get("corrupted_accuracy")
        return None if found is None else statistics.fmean(found[kind])

    return Metric(f"corrupted_{kind}", f"with {kind}, %", ".2f", value)


def _ratio_of_losses(summary: Summary) -> float | None:
    return summary.get("predicted_vs_measured", {}).get("median_ratio")


METRICS = (
    _plain("test_accuracy_last", "test accuracy, %", ".2f"),
    _plain("test_accuracy_best", "best epoch, %", ".2f"),
    _plain("train_accuracy_last", "training accuracy, %", ".2f"),
    Metric("gap", "gap, points", ".2f", lambda s: s["train_accuracy_last"] - s["test_accuracy_last"]),
    _plain("test_nll", "NLL", ".4f"),
    _plain("test_ece", "ECE", ".4f"),
    _plain("corrupted_accuracy_mean", "corrupted, %", ".2f"),
    *(_corrupted(kind) for kind in KINDS),
    _plain("params_after", "parameters", ",.0f"),
    _fraction("params", "parameters left, %"),
    _plain("macs_after", "multiply-accumulates", ",.0f"),
    _fraction("macs", "multiply-accumulates left, %"),
    _plain("hessian_lambda_max", "λmax of the Hessian", ".3g"),
    _plain("spectral_radius_kfac", "radius, K-FAC", ".3g"),
    _plain("spectral_radius_kfac_geometric_mean", "radius, geometric mean", ".3g"),
    *(
        _plain(f"latency_{when}_{size}", f"ms an image {when}, batch {size}", ".4f")
        for size in (1, 128)
        for when in ("before", "after")
    ),
    Metric("measured_over_predicted", "loss measured over predicted, median", ".2f", _ratio_of_losses),
    _plain("seconds", "seconds", ".1f"),
    *(_plain(f"spearman_{name}", f"rank correlation, {name.replace('_', ' ')}", ".2f") for name in TRACKED),
)
BY_KEY = {metric.key: metric for metric in METRICS}


class Statistic(NamedTuple):
    """Mean of a figure over n seeds, and its standard deviation (of a difference: the error); None for one seed."""

    mean: float
    deviation: float | None
    n: int

    def text(self, form: str) -> str:
        """As in "83.44 ± 0.52"."""
        if self.deviation is None:
            return f"{self.mean:{form}}"
        return f"{self.mean:{form}} ± {self.deviation:{form}}"


@dataclass
class Group:
    """The runs of one variant at one point of the grid.

    Attributes:
        variant, point: where it stands.
        summaries: seed -> figures of the runs that ended.
        diverged, failed: seed -> why, of those that did not.
        missing: seeds that have not been run yet.
        chosen: what tuning chose, "" without tuning.
        folders: seed -> folder of the run.
    """

    variant: str
    point: Point
    summaries: dict[int, Summary] = field(default_factory=dict)
    diverged: dict[int, str] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    missing: list[int] = field(default_factory=list)
    chosen: str = ""
    folders: dict[int, Path] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As in "SAM, target_params 0.1"."""
        return ", ".join([self.variant, *(f"{axis} {value}" for axis, value in self.point)])

    def values(self, key: str) -> list[float]:
        """A figure of every run that ended and has it."""
        found = (BY_KEY[key].value(summary) for summary in self.summaries.values())
        return [value for value in found if value is not None]

    def statistic(self, key: str) -> Statistic | None:
        """Mean and sample standard deviation over the seeds; None where no run has the figure."""
        values = self.values(key)
        if not values:
            return None
        return Statistic(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))

    @property
    def state(self) -> str:
        """What is to be known besides means: "" where every seed ended."""
        total = len(self.summaries) + len(self.diverged) + len(self.failed) + len(self.missing)
        parts = [("diverged", self.diverged), ("failed", self.failed), ("not run", self.missing)]
        return ", ".join(f"{name} {len(which)} of {total}" for name, which in parts if which)


class Results:
    """The figures of a study, grouped over seeds.

    Args:
        plan: of the study.

    Attributes:
        groups: one for each variant and point, in the order of the file.
        versions: of all that the runs were made with, joined by "or" where they differ.
    """

    def __init__(self, plan: Plan) -> None:
        self.study = plan.study
        groups: dict[tuple[str, Point], Group] = {}
        for cell in plan.study.cells:
            group = groups.setdefault((cell.variant, cell.point), Group(cell.variant, cell.point))
            _add(group, cell, plan)
        order = {name: place for place, name in enumerate(plan.study.variants)}
        self.groups = sorted(groups.values(), key=lambda group: order[group.variant])
        self.versions = _versions(summary for group in self.groups for summary in group.summaries.values())

    def group(self, variant: str, **point: Any) -> Group:
        """The group of a variant at a point, axes by their labels; KeyError if there is none."""
        wanted = {axis: str(value) for axis, value in point.items()}
        for group in self.groups:
            if group.variant == variant and wanted.items() <= dict(group.point).items():
                return group
        raise KeyError(f"no group {variant!r} at {wanted}")

    def difference(self, group: Group, key: str) -> Statistic | None:
        """By how much a figure exceeds that of the study's reference at the same point and seed.

        Returns:
            Mean over the seeds that both have, and its standard error; None where there is none.
        """
        spot = (self.study.reference, group.point)
        other = next((g.summaries for g in self.groups if (g.variant, g.point) == spot), {})
        value = BY_KEY[key].value
        pairs = [(value(own), value(other[seed])) for seed, own in group.summaries.items() if seed in other]
        found = [a - b for a, b in pairs if a is not None and b is not None]
        if not found:
            return None
        error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else None
        return Statistic(statistics.fmean(found), error, len(found))

    def present(self, keys: Iterable[str]) -> list[Metric]:
        """Those of these metrics that any run has."""
        return [BY_KEY[key] for key in keys if any(group.values(key) for group in self.groups)]


def _add(group: Group, cell: Cell, plan: Plan) -> None:
    outcome, resolved = plan.final(cell), plan.resolve(cell)
    group.chosen = resolved.chosen if resolved is not None else ""
    if outcome is None:
        group.missing.append(cell.seed)
    elif outcome.summary is None:
        (group.diverged if outcome.kind == DIVERGED else group.failed)[cell.seed] = outcome.message
    elif resolved is not None and resolved.settings is not None:
        folder = plan.folder_of(plan.key(resolved.settings))
        group.folders[cell.seed] = folder
        group.summaries[cell.seed] = {**outcome.summary, **tracking(folder / HISTORY_FILE)}


def tracking(history: Path) -> dict[str, float]:
    """Rank correlation (Spearman) of each K-FAC radius with the true largest Hessian eigenvalue over a run's epochs.

    Epochs in which the eigenvalue was not measured do not count; with fewer than three, or with radii that do not
    change, there is no correlation.

    Returns:
        `spearman_NAME` for the radii of `TRACKED` that the history has.
    """
    from scipy.stats import spearmanr

    records = [record for record in read_history(history) if record.get("hessian_lambda_max") is not None]
    found = {}
    for name in TRACKED:
        pairs = [(record[name], record["hessian_lambda_max"]) for record in records if record.get(name) is not None]
        if len(pairs) >= 3 and all(len(set(column)) > 1 for column in zip(*pairs)):
            value = float(spearmanr(*zip(*pairs)).statistic)
            if math.isfinite(value):
                found[f"spearman_{name}"] = value
    return found


def _versions(summaries: Iterable[Summary]) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    for summary in summaries:
        for name, version in summary["versions"].items():
            if version not in found.setdefault(name, []):
                found[name].append(version)
    return {name: " or ".join(versions) for name, versions in found.items()}
