"""Plots of a study: accuracy against size, work, latency and radius, and the gap between training and test.

Where the first axis of the grid is no size, figures along that axis instead: rank correlations if they were measured.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flatprune.reporting.drawing import BLUE, GREY, INK, ROSE, TEAL, plain, style_axis
from flatprune.study.results import BY_KEY, Group, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANELS = (
    ("params_after", "test_accuracy_last"),
    ("macs_after", "test_accuracy_last"),
    ("latency_after_1", "test_accuracy_last"),
    ("latency_after_128", "test_accuracy_last"),
    ("spectral_radius_kfac", "test_accuracy_last"),
    ("params_after", "gap"),
)
_ALONG = ("test_accuracy_last", "gap", "test_nll", "test_ece", "corrupted_accuracy_mean", "hessian_lambda_max")
_CORRELATIONS = tuple(key for key in BY_KEY if key.startswith("spearman_"))
_SIZES = "target_"
_COLORS = (BLUE, ROSE, TEAL, INK, "#e08a1e", "#7b4fd6", "#4aa3df", "#8c6d46", GREY, "#b8c21a")
_MARKERS = "osD^vP*X<>"
_LABEL_LENGTH = 44  # characters below a panel
_LOGARITHMIC = 3.0  # from this ratio of the largest to the least on


def figure(results: Results, groups: Sequence[Group], title: str) -> Figure:
    """All panels whose figures were measured, a line a variant, with bars of one standard deviation both ways.

    Args:
        results: of the study.
        groups: those to draw.
        title: above the panels.
    """
    from matplotlib.figure import Figure

    axis_name = next(iter(results.study.axes), _SIZES)
    panels: list[tuple[str | None, str]]
    if axis_name.startswith(_SIZES):
        panels = [(x, y) for x, y in _PANELS if any(group.values(x) for group in groups)]
    else:
        along = results.present(_CORRELATIONS) or results.present(_ALONG)
        panels = [(None, metric.key) for metric in along]
    columns = 2
    lines = -(-len(panels) // columns) or 1
    plot = Figure(figsize=(10.5, 1.1 + 3.5 * lines), facecolor="white")
    axes = list(plot.subplots(lines, columns, squeeze=False).flat)
    height = plot.get_figheight()
    plot.subplots_adjust(left=0.07, right=0.76, top=1 - 0.85 / height, bottom=0.6 / height, hspace=0.42, wspace=0.22)
    for axis, (x, y) in zip(axes, panels):
        if x is None:
            _along(axis, groups, axis_name, y)
        else:
            _panel(axis, groups, x, y)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    plot.legend(
        handles, labels, loc="upper left", bbox_to_anchor=(0.775, 1 - 0.8 / height), frameon=False, fontsize=9.5
    )
    plot.text(0.03, 1 - 0.4 / height, plain(title), color=INK, fontsize=13, fontweight="bold")
    return plot


def _along(axis: Axes, groups: Sequence[Group], name: str, y: str) -> None:
    """One figure at each value of an axis of the grid, in its order."""
    style_axis(axis, BY_KEY[y].title if y in _CORRELATIONS else f"{BY_KEY[y].title} by {name.replace('_', ' ')}")
    labels = list(dict.fromkeys(group.point[0][1] for group in groups))
    ordered = all(_is_number(label) for label in labels)
    variants = list(dict.fromkeys(group.variant for group in groups))
    for place, variant in enumerate(variants):
        found = [(group, group.statistic(y)) for group in groups if group.variant == variant]
        points = [(labels.index(group.point[0][1]), value) for group, value in found if value is not None]
        style = _style(place)
        if not ordered:
            style["linestyle"] = "none"
        beside = 0.05 * (place - (len(variants) - 1) / 2)  # so that bars do not cover each other
        axis.errorbar(
            [x + beside for x, _ in points],
            [value.mean for _, value in points],
            yerr=[value.deviation or 0.0 for _, value in points],
            label=plain(variant),
            **style,
        )
    width = max(1, _LABEL_LENGTH // len(labels))
    axis.set_xticks(range(len(labels)), [textwrap.fill(plain(label), width) for label in labels])
    axis.set_xlim(-0.4, len(labels) - 0.6)
    if y in _CORRELATIONS:
        axis.set_ylim(-1.05, 1.05)


def _is_number(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True


def _style(place: int) -> dict[str, Any]:
    return {
        "color": _COLORS[place % len(_COLORS)],
        "marker": _MARKERS[place % len(_MARKERS)],
        "linestyle": "-" if place < len(_COLORS) else ":",
        "markersize": 4.5,
        "linewidth": 1.3,
        "elinewidth": 0.9,
        "capsize": 2,
    }


def _panel(axis: Axes, groups: Sequence[Group], x: str, y: str) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

    style_axis(axis, f"{BY_KEY[y].title} against {BY_KEY[x].title}")
    drawn: list[float] = []
    for place, variant in enumerate(dict.fromkeys(group.variant for group in groups)):
        pairs = [(group.statistic(x), group.statistic(y)) for group in groups if group.variant == variant]
        points = [(a, b) for a, b in pairs if a is not None and b is not None]  # in the order of the grid
        if not points:
            continue
        drawn += [a.mean for a, _ in points]
        axis.errorbar(
            [a.mean for a, _ in points],
            [b.mean for _, b in points],
            xerr=[a.deviation or 0.0 for a, _ in points],
            yerr=[b.deviation or 0.0 for _, b in points],
            label=plain(variant),
            **_style(place),
        )
    if drawn and min(drawn) > 0 and max(drawn) / min(drawn) > _LOGARITHMIC:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 50k
        axis.xaxis.set_minor_locator(NullLocator())
    else:
        axis.xaxis.set_major_locator(MaxNLocator(4))
