"""The part of the report about removal events: what each of them did, and whether the predictions came true."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flatprune.pruning.predicted_vs_measured import Cut, cuts, in_words
from flatprune.pruning.targets import UNITS, amount
from flatprune.reporting.drawing import BLUE, GREY, INK, png, style_axis
from flatprune.reporting.page import figure_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def predicted_vs_measured_section(summary: dict[str, Any], history: Sequence[dict[str, Any]]) -> str:
    """HTML: predicted against measured change of the loss, as a figure and in words; empty without both."""
    pairs = cuts(history)
    if not pairs:
        return ""
    image = figure_of(
        png(predicted_vs_measured_figure(pairs)), "predicted against measured change of the loss at each cut"
    )
    words = html.escape(in_words(summary["predicted_vs_measured"]))
    return (
        f'<h3>Predicted and measured changes of the loss</h3><p>{words}.</p><div style="max-width: 30rem">{image}</div>'
    )


def predicted_vs_measured_figure(pairs: Sequence[Cut]) -> Figure:
    """One point a cut, darker the later it was; on the diagonal the loss changed as predicted."""
    from matplotlib.figure import Figure

    plot = Figure(figsize=(4.6, 4.2), facecolor="white")
    axis = plot.subplots()
    plot.subplots_adjust(left=0.17, right=0.96, top=0.9, bottom=0.14)
    values = [value for cut in pairs for value in (cut.predicted, cut.measured)]
    if min(values) > 0.0:
        axis.set_xscale("log")
        axis.set_yscale("log")
    low, high = min(values), max(values)
    axis.plot([low, high], [low, high], color=GREY, linewidth=1.0, linestyle=(0, (4, 2)))
    shades = [0.3 + 0.7 * number / len(pairs) for number in range(1, len(pairs) + 1)]
    axis.scatter([cut.predicted for cut in pairs], [cut.measured for cut in pairs], color=BLUE, alpha=shades, s=26)  # type: ignore[arg-type]
    style_axis(axis, "measured change of the loss (later cuts darker)")
    axis.set_xlabel("predicted change", color=INK, fontsize=10)
    return plot


def events_section(summary: dict[str, Any], history: Sequence[dict[str, Any]]) -> str:
    """HTML: a folded table with a row for each cut, each event that removed nothing and the end of pruning."""
    rows = [_row(summary, records) for records in _by_cut(history)]
    if not rows:
        return ""
    stopped = summary["pruning_stopped"]
    reason = f"<p>Pruning stopped: {html.escape(stopped)}.</p>" if stopped else ""
    head = "".join(f"<th>{name}</th>" for name in ("step", "neurons", "left", "predicted", "measured", "from"))
    return (
        f"<h3>Removal events</h3>{reason}<details><summary>{len(rows)} rows: step, neurons removed, "
        f"{UNITS[summary['target_unit']]} left (and budget), change of the loss, layers</summary>"
        f"<table><tr>{head}</tr>{''.join(rows)}</table></details>"
    )


def _by_cut(history: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    found: dict[tuple[int, int, str], list[dict[str, Any]]] = {}
    for record in history:
        if record["kind"] in ("removal", "event", "stop"):
            found.setdefault((record["step"], record["round"], record["kind"]), []).append(record)
    return list(found.values())


def _row(summary: dict[str, Any], records: list[dict[str, Any]]) -> str:
    last, unit = records[-1], summary["target_unit"]
    layers = ", ".join(f"{r['layer']} {r['width_before']} → {r['width_after']}" for r in records if r["layer"])
    cells = [
        str(last["step"]),
        str(sum(record["removed"] for record in records)),
        f"{amount(unit, last['cost_after'])} ({amount(unit, last['budget'])})",
        *("" if last[key] is None else f"{last[key]:.3g}" for key in ("predicted_change", "measured_change")),
        "; ".join(filter(None, (layers, last["note"]))),
    ]
    return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
