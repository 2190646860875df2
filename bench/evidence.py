"""Puts the tables and plots of finished studies into docs/results.md.

    flatprune study bench/studies/q1_size_digits.yaml --data-dir data --out runs/q1_size_digits     # and the others
    python -m bench.evidence runs

Replaces what stands between the lines `<!-- NAME -->` for every study NAME that has a folder there, and its plot.
Entries without a finished run are left out.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from scipy.stats import spearmanr

from bench.documents import replace_between
from flatprune.files.atomic import write_atomically
from flatprune.reporting.drawing import png
from flatprune.study import Results
from flatprune.study.grid import Point
from flatprune.study.plots import figure
from flatprune.study.report import open_study
from flatprune.study.results import BY_KEY, Statistic, Summary
from flatprune.study.tables import Table, details, differences, overview

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
ACCURACY = ("test_accuracy_last",)
CALIBRATION = (*ACCURACY, "test_nll", "test_ece", "corrupted_accuracy_mean", "hessian_lambda_max")
STUDIES = {  # what is shown of each
    "q1_size_digits": ACCURACY,
    "q1_size_fashion": ACCURACY,
    "q1_size_cifar_small": ACCURACY,
    "q2_noise": CALIBRATION,
    "q2_small_data": CALIBRATION,
    "q2_corruption_calibration": CALIBRATION,
    "q2_fitting": ("train_accuracy_last", *CALIBRATION, "spectral_radius_kfac"),
    "q3_radius": tuple(key for key in BY_KEY if key.startswith("spearman_")),
    "q4_cost": ("seconds", *ACCURACY, "macs_left", "hessian_lambda_max"),
    "longer": (*ACCURACY, "train_accuracy_last", "test_nll"),
    "transformers": (*ACCURACY, "train_accuracy_last", "test_nll", "params_after", "macs_after"),
    "growth": (*ACCURACY, "train_accuracy_last"),
}
_IN_ONE_TABLE = ("q3_radius", "q4_cost", "transformers")
_WITHOUT_PLOT = ("q4_cost", "longer", "transformers", "growth")  # one size; tasks of their own scales
_WITH_KINDS = ("transformers",)
_KINDS = {  # layers whose rows are of a kind
    "heads": r"qkv|query|q_proj",
    "perceptrons": r"mlp\.0|intermediate\.dense|gate_proj",
    "residual stream": r"patches|attention\.output\.dense|o_proj",
}
_WITH_CORRELATIONS = ("q2_fitting",)
_OPTIONS = {"q4_cost": " --jobs 1"}  # what is timed runs alone
_DOTS_PER_INCH = 70


def section(results: Results, name: str) -> str:
    """Command, versions and tables of a study, Markdown."""
    versions = ", ".join(f"{package} {version}" for package, version in results.versions.items())
    command = f"flatprune study bench/studies/{name}.yaml --data-dir data --out runs/{name}{_OPTIONS.get(name, '')}"
    lines = [f"    {command}", "", f"{versions}.", ""]
    for table in _tables(results, name):
        lines += [f"**{table.title}**", "", table.markdown(), ""]
    chosen = _chosen(results)
    if chosen and name not in _IN_ONE_TABLE:  # which has a column of it
        lines += [f"Chosen by the tuning: {chosen}.", ""]
    if name not in _WITHOUT_PLOT:
        lines += [f"![{results.study.title}]({name}.png)", ""]
    return "\n".join(lines[:-1])


def _tables(results: Results, name: str) -> list[Table]:
    keys = STUDIES[name]
    if name in _WITH_KINDS:
        results.groups.sort(key=lambda group: results.study.axes["task"].index(dict(group.point)["task"]))
        against = [table for key in (*ACCURACY, "test_nll") for table in differences(results, key)]
        return [_only_run(table) for table in (details(results, keys), *against, widths_by_kind(results, "dense"))]
    if name in _IN_ONE_TABLE:
        return [_only_run(details(results, keys))]
    shown = [table for key in keys if results.present([key]) for table in overview(results, key)]
    shown += differences(results)
    if name in _WITH_CORRELATIONS:
        shown.append(correlations(results))
    return [_only_run(table) for table in shown if table.rows]


def correlations(results: Results) -> Table:
    """Spearman's, of sharpness and the gap between training and test accuracy, over all runs at a point."""
    sharpness = ("hessian_lambda_max", "spectral_radius_kfac")
    at: dict[Point, list[Summary]] = {}
    for group in results.groups:
        at.setdefault(group.point, []).extend(group.summaries.values())
    rows = []
    for point, summaries in at.items():
        gap, *others = ([BY_KEY[key].value(summary) for summary in summaries] for key in ("gap", *sharpness))
        cells = [f"{spearmanr(gap, other).statistic:.2f} ({len(gap)})" for other in others]
        rows.append((", ".join(f"{axis} {value}" for axis, value in point), *cells))
    head = ("", *(BY_KEY[key].title for key in sharpness))
    return Table("rank correlation with the gap between training and test accuracy, all runs (n)", head, tuple(rows), 1)


def widths_by_kind(results: Results, whole: str) -> Table:
    """What is left of the rows of all layers of a kind, against the variant `whole` at the same point."""
    rows = []
    wholes = {g.point: next(iter(g.summaries.values())) for g in results.groups if g.variant == whole and g.summaries}
    for group in results.groups:
        before = wholes.get(group.point)
        if group.variant == whole or before is None or not group.summaries:
            continue
        cells = []
        for layers in map(re.compile, _KINDS.values()):
            wide = sum(width for name, width in before["widths_after"].items() if layers.search(name))
            left = [
                100.0 * sum(width for name, width in summary["widths_after"].items() if layers.search(name)) / wide
                for summary in group.summaries.values()
            ]
            deviation = statistics.stdev(left) if len(left) > 1 else None
            cells.append(Statistic(statistics.fmean(left), deviation, len(left)).text(".0f"))
        rows.append((group.variant, *dict(group.point).values(), str(len(group.summaries)), *cells))
    head = ("variant", *results.study.axes, "n", *_KINDS)
    return Table(
        f"widths left, % of {whole}, mean ± standard deviation", head, tuple(rows), len(head) - len(_KINDS) - 1
    )


def _only_run(table: Table) -> Table:
    """The table without columns in which nothing was run."""
    rows = [[cell if " (" in cell or "±" in cell else _unless_missing(cell) for cell in row] for row in table.rows]
    kept = [place for place in range(len(table.head)) if place == 0 or any(row[place] for row in rows)]
    picked = tuple(tuple(row[place] for place in kept) for row in rows)
    words = sum(place < table.left for place in kept)
    return Table(table.title, tuple(table.head[place] for place in kept), picked, words)


def _unless_missing(cell: str) -> str:
    return "" if cell.startswith("not run") else cell


def _chosen(results: Results) -> str:
    places: dict[str, list[str]] = {}
    for group in results.groups:
        if group.chosen:
            value = group.chosen.rsplit(" ", 1)[-1]
            places.setdefault(group.variant, []).append(value)
    return "; ".join(f"{variant} {', '.join(values)}" for variant, values in places.items())


def write_plot(results: Results, path: Path) -> None:
    """The plot of the variants that were run at more than one point, small."""
    variants = [group.variant for group in results.groups]
    shown = [group for group in results.groups if variants.count(group.variant) > 1] or results.groups
    write_atomically(path, png(figure(results, shown, results.study.title), _DOTS_PER_INCH))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the studies' folders")
    parser.add_argument("--page", type=Path, default=PAGE, help="default docs/results.md; plots go beside it")
    given = parser.parse_args(arguments)
    for name in STUDIES:
        if not (given.folder / name).is_dir():
            continue
        results = Results(open_study(given.folder / name))
        results.groups = [group for group in results.groups if group.summaries]
        if not results.groups:
            continue
        replace_between(given.page, name, section(results, name))
        if name not in _WITHOUT_PLOT:
            write_plot(results, given.page.parent / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
