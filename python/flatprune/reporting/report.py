"""The result for people: a figure over time (PNG) and a page that needs nothing else (HTML)."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatprune.files.atomic import write_atomically
from flatprune.pruning.targets import UNITS, amount
from flatprune.reporting.drawing import BLUE, GREY, INK, ROSE, TEAL, label_right, log_ticks, plain, png, style_axis
from flatprune.reporting.page import card, document, duration, figure_of, number, value_rows
from flatprune.reporting.report_events import events_section, predicted_vs_measured_section

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOT_FILE = "progress.png"
VALLEYS_FILE = "valleys.png"
REPORT_FILE = "report.html"
_COMPARED = {"dense": ("dense", INK), "no_flatness": ("pruned, no flatness term", ROSE), "pruned": ("pruned", BLUE)}


def write_report(
    folder: Path,
    summary: dict[str, Any],
    history: list[dict[str, Any]],
    dense_history: list[dict[str, Any]] | None = None,
) -> None:
    """Write `progress.png` and `report.html` into `folder`, and `valleys.png` where networks are compared.

    Args:
        folder: of the run.
        summary: content of `summary.json`.
        history: records of `history.jsonl`.
        dense_history: the same of the network trained without pruning, drawn behind.
    """
    image = png(figure(summary, history, dense_history or []))
    write_atomically(folder / PLOT_FILE, image)
    if "valleys" in summary:
        write_atomically(folder / VALLEYS_FILE, png(valleys_figure(summary)))
    write_atomically(folder / REPORT_FILE, page(summary, history, image))


def figure(summary: dict[str, Any], history: list[dict[str, Any]], dense_history: list[dict[str, Any]]) -> Figure:
    """Accuracy, parameters left and spectral radius over the epochs, one above the other."""
    from matplotlib.figure import Figure

    epochs = [record for record in history if record["kind"] == "epoch"]
    dense = [record for record in dense_history if record["kind"] == "epoch"]
    plot = Figure(figsize=(8.4, 8.4), facecolor="white")
    axes = plot.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": (1.25, 1.0, 1.0), "hspace": 0.22})
    plot.subplots_adjust(left=0.075, right=0.83, top=0.865, bottom=0.06)
    axes[2].set_xlim(0, summary["epochs"])
    _draw_accuracy(axes[0], epochs, dense)
    _draw_size(axes[1], summary, history)
    _draw_radius(axes[2], epochs, dense)
    for axis, name in zip(axes, ("accuracy, %", "parameters left, %", "spectral radius, K-FAC")):
        style_axis(axis, name)
        _shade_pruning(axis, summary, history, name_it=axis is axes[0])
    axes[2].set_xlabel("epoch", color=INK, fontsize=10)
    title = headline(summary)
    size = min(14.0, 14.0 * 64 / len(title))
    plot.text(0.03, 0.957, plain(title), color=INK, fontsize=size, fontweight="bold")
    plot.text(0.03, 0.928, plain(subline(summary)), color=GREY, fontsize=10)
    return plot


def valleys_figure(summary: dict[str, Any]) -> Figure:
    """The loss along the Hessian's top eigenvector of each network, above its value where training ended."""
    from matplotlib.figure import Figure

    plot = Figure(figsize=(8.4, 4.2), facecolor="white")
    axis = plot.subplots()
    plot.subplots_adjust(left=0.075, right=0.74, top=0.86, bottom=0.13)
    valleys = summary["valleys"]
    labels = []
    for name, (title, color) in _COMPARED.items():
        if name in valleys:
            losses = valleys[name]
            rise = [loss - losses[len(losses) // 2] for loss in losses]
            axis.plot(valleys["distances"], rise, color=color, linewidth=2.0 if name == "pruned" else 1.4)
            key = "hessian_lambda_max" if name == "pruned" else f"{name}_hessian_lambda_max"
            labels.append((rise[-1], f"{title}\nλmax {number(summary[key])}", color))
    style_axis(axis, "rise of the loss along the top eigenvector of the Hessian")
    axis.set_xlabel("distance from the trained weights (batch norms folded in)", color=INK, fontsize=10)
    label_right(axis, labels)
    return plot


def headline(summary: dict[str, Any]) -> str:
    """The result in one line."""
    accuracy = f"{summary['test_accuracy_last']:.1f} % accuracy"
    if summary["target_fraction"] >= 1.0:
        return f"{summary['model']} on {_data_name(summary)}: {accuracy}"
    left = f"{100.0 * summary['cost_after'] / summary['cost_before']:.1f} % of the {UNITS[summary['target_unit']]}"
    return f"{summary['model']} on {_data_name(summary)}: {accuracy} with {left}"


def subline(summary: dict[str, Any]) -> str:
    """What the result compares with."""
    parts = [f"{summary['params_before']:,} → {summary['params_after']:,} parameters"]
    if summary["target_fraction"] >= 1.0:
        parts = [f"{summary['params_before']:,} parameters, not pruned"]
    if "dense_test_accuracy_last" in summary:
        parts.append(f"dense network {summary['dense_test_accuracy_last']:.1f} %")
    if summary["pruning_stopped"]:
        parts.append("pruning stopped early")
    return " · ".join([*parts, f"{summary['epochs']} epochs", f"seed {summary['seed']}"])


def _draw_accuracy(axis: Axes, epochs: list[dict[str, Any]], dense: list[dict[str, Any]]) -> None:
    x = [record["epoch"] for record in epochs]
    tested = [record for record in epochs if record["test_accuracy"] is not None]
    test = [record["test_accuracy"] for record in tested]
    train = [record["train_accuracy"] for record in epochs]
    labels = [(test[-1], f"test {test[-1]:.1f} %", BLUE), (train[-1], f"train {train[-1]:.1f} %", GREY)]
    if dense:
        dense = [record for record in dense if record["test_accuracy"] is not None]
        values = [record["test_accuracy"] for record in dense]
        axis.plot([record["epoch"] for record in dense], values, color=INK, linewidth=1.1, linestyle=(0, (4, 2)))
        labels.append((values[-1], f"dense {values[-1]:.1f} %", INK))
    axis.plot(x, train, color=GREY, linewidth=1.0, alpha=0.7)
    lone = "o" if len(test) == 1 else ""
    axis.plot([record["epoch"] for record in tested], test, color=BLUE, linewidth=2.0, marker=lone)
    settled = sorted(test + train)[len(train) // 5 :]  # the first steps would squeeze all the rest
    low = max(0.0, settled[0] - 2.0)
    high = min(100.5, settled[-1] + 1.5)
    axis.set_ylim(low, max(high, low + 1.0))
    label_right(axis, labels)


def _draw_size(axis: Axes, summary: dict[str, Any], history: list[dict[str, Any]]) -> None:
    before = summary["params_before"]
    x, y = [0.0], [100.0]
    for record in history:
        if "params" in record:
            x.append(record["step"] / summary["steps"] * summary["epochs"])
            y.append(100.0 * record["params"] / before)
    axis.step(x, y, where="post", color=TEAL, linewidth=2.0)
    axis.fill_between(x, y, step="post", color=TEAL, alpha=0.10, linewidth=0)
    axis.set_ylim(0, 105)
    labels = [(y[-1], f"{_left(summary)}\n{summary['params_after']:,}", TEAL)]
    if summary["target_unit"] != "params" and summary["cost_before"]:
        labels.append(_draw_cost(axis, summary, history))
    label_right(axis, labels)


def _draw_cost(axis: Axes, summary: dict[str, Any], history: list[dict[str, Any]]) -> tuple[float, str, str]:
    """What is left in the unit of the target, beside the parameters; returns the label of the line's end."""
    cuts = [record for record in history if record["kind"] == "removal"]
    left = [100.0 * cost / summary["cost_before"] for cost in (*(r["cost_after"] for r in cuts), summary["cost_after"])]
    x = [0.0, *(record["step"] / summary["steps"] * summary["epochs"] for record in cuts), float(summary["epochs"])]
    axis.step(x, [100.0, *left], where="post", color=INK, linewidth=1.3, linestyle=(0, (1, 1)))
    name = UNITS[summary["target_unit"]].replace("-", "-\n")  # the margin is narrow
    return left[-1], f"{name}\n{left[-1]:.1f} %", INK


def _draw_radius(axis: Axes, epochs: list[dict[str, Any]], dense: list[dict[str, Any]]) -> None:
    axis.set_yscale("log")
    labels = []
    if dense:
        _draw_positive(axis, dense, "spectral_radius", color=INK, linewidth=1.1, linestyle=(0, (4, 2)))
        labels.append((dense[-1]["spectral_radius"], f"dense {dense[-1]['spectral_radius']:.2g}", INK))
    for key, name, style in (
        ("spectral_radius", "largest layer", {"linewidth": 2.0}),
        ("spectral_radius_geometric_mean", "geometric mean", {"linewidth": 1.1, "alpha": 0.65}),
    ):
        _draw_positive(axis, epochs, key, color=ROSE, **style)
        labels.append((epochs[-1][key], f"{name}\n{epochs[-1][key]:.2g}", ROSE))
    log_ticks(axis)
    label_right(axis, [label for label in labels if label[0] > 0])


def _draw_positive(axis: Axes, records: list[dict[str, Any]], key: str, **style: Any) -> None:
    kept = [record for record in records if (record[key] or 0.0) > 0.0]
    axis.plot([record["epoch"] for record in kept], [record[key] for record in kept], **style)


def _shade_pruning(axis: Axes, summary: dict[str, Any], history: list[dict[str, Any]], *, name_it: bool) -> None:
    steps = [record["step"] for record in history if record["kind"] == "removal"]
    if steps:
        first, last = (step / summary["steps"] * summary["epochs"] for step in (steps[0], steps[-1]))
        axis.axvspan(first, last, color=INK, alpha=0.04, linewidth=0)
        if name_it:
            above = axis.get_xaxis_transform()
            name = "pruning, stopped" if summary["pruning_stopped"] else "pruning"
            axis.text((first + last) / 2, 1.02, name, transform=above, color=GREY, fontsize=8.5, ha="center")


def page(summary: dict[str, Any], history: list[dict[str, Any]], image: bytes) -> str:
    """The HTML page, with the figure inside it."""
    body = _BODY.format(
        cards="".join(card(*entry) for entry in _cards(summary)),
        figure=figure_of(image, "accuracy, parameters and spectral radius over the epochs") + _valleys_section(summary),
        events=predicted_vs_measured_section(summary, history) + events_section(summary, history),
        layers=_layer_rows(summary),
        settings=value_rows(summary["settings"]),
        versions=value_rows(summary["versions"]),
    )
    return document(headline(summary), subline(summary), body)


def _valleys_section(summary: dict[str, Any]) -> str:
    if "valleys" not in summary:
        return ""
    return figure_of(png(valleys_figure(summary)), "the loss along the top eigenvector of the Hessian")


def _cards(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    dense = summary.get("dense_test_accuracy_last")
    accuracy = f"{summary['test_accuracy_last']:.2f} %"
    against = f"best epoch {summary['test_accuracy_best']:.2f} %"
    if dense is not None:
        against = f"dense {dense:.2f} % ({summary['test_accuracy_last'] - dense:+.2f})"
    return [
        ("test accuracy", accuracy, against),
        ("parameters", _left(summary), f"{summary['params_before']:,} → {summary['params_after']:,}"),
        (
            "multiply-accumulates",
            f"{100.0 * summary['macs_after'] / summary['macs_before']:.1f} %",
            f"{summary['macs_before']:,} → {summary['macs_after']:,} an image",
        ),
        *_target_card(summary),
        *_radius_cards(summary),
        ("training time", duration(summary["seconds"]), _of_training(summary)),
    ]


def _of_training(summary: dict[str, Any]) -> str:
    share = summary["removal_seconds"] / summary["seconds"]
    removals = f", {100 * share:.1f} % of it for removals" if share else ""
    return f"{summary['epochs']} epochs, {summary['steps']:,} steps{removals}"


def _target_card(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Neurons or latency, where they are the target; the other units have cards anyway."""
    unit, before, after = summary["target_unit"], summary["cost_before"], summary["cost_after"]
    if unit not in ("neurons", "latency") or not before:
        return []
    return [(UNITS[unit], f"{100.0 * after / before:.1f} %", f"{amount(unit, before)} → {amount(unit, after)}")]


def _radius_cards(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    titles = {"hessian_lambda_max": "λmax of the Hessian", "spectral_radius_kfac": "spectral radius (K-FAC)"}
    return [(title, *_with_dense(summary, key)) for key, title in titles.items() if key in summary]


def _with_dense(summary: dict[str, Any], key: str) -> tuple[str, str]:
    dense = summary.get(f"dense_{key}")
    return number(summary[key]), "at the end of training" if dense is None else f"dense {number(dense)}"


def _layer_rows(summary: dict[str, Any]) -> str:
    rows = []
    most = max(summary["widths_before"].values())
    for name, before in summary["widths_before"].items():
        after = summary["widths_after"][name]
        whole, kept = 100.0 * before / most, 100.0 * after / before
        bar = f'<div class="bar" style="width:{whole:.1f}%"><i style="width:{kept:.1f}%"></i></div>'
        rows.append(f"<tr><td>{html.escape(name)}</td><td>{before}</td><td>{after}</td><td>{bar}</td></tr>")
    return "".join(rows)


def _left(summary: dict[str, Any]) -> str:
    return f"{100.0 * summary['params_after'] / summary['params_before']:.1f} %"


def _data_name(summary: dict[str, Any]) -> str:
    return Path(summary["data"]).stem


_BODY = """<div class="cards">{cards}</div>
{figure}
{events}<h3>Width of every layer, before and after</h3>
<table class="values"><tr><th>layer</th><th>before</th><th>after</th><th></th></tr>{layers}</table>
<h3>Use the network</h3>
<p><code>model = flatprune.load("…this folder…")</code>
then <code>model(model.normalization(images)).argmax(1)</code>
for uint8 images [n, height, width, channels].</p>
<h3>Settings</h3>
<table class="values">{settings}</table>
<h3>Versions</h3>
<table class="values">{versions}</table>"""
