"""The look that all figures share: colours, axes, labels at the ends of lines, PNG bytes."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, PALE = "#1f2430", "#7a8194", "#e6e8ef"
BLUE, TEAL, ROSE = "#2f5bea", "#0f9b8e", "#d6456b"
_DPI = 200
_LINE = 0.15  # inches of a line of text


def plain(text: str) -> str:
    """`text` as matplotlib draws it letter by letter: a `$` begins no formula, and names may hold any bytes."""
    shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    shown = f" {shown}" if shown.startswith("_") else shown  # matplotlib leaves labels out that begin so
    return shown.replace("$", r"\$") or " "


def png(plot: Figure, dots_per_inch: int = _DPI) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    plot.savefig(buffer, format="png", dpi=dots_per_inch)
    return buffer.getvalue()


def label_right(axis: Axes, labels: list[tuple[float, str, str]]) -> None:
    """Write each label at the height of its line's end; those that would touch are moved apart evenly."""
    ordered = sorted(labels, key=lambda label: label[0])
    low, high = axis.transScale.transform([(1, bound) for bound in axis.get_ylim()])[:, 1]
    wanted = [(axis.transScale.transform((1, label[0]))[1] - low) / (high - low) for label in ordered]
    line = _LINE * axis.figure.dpi / axis.bbox.height  # the height of a line of text as a fraction of this panel
    half = [line * (0.5 + 0.5 * label[1].count("\n")) * 1.25 for label in ordered]
    for height, (_, text, color) in zip(spread(wanted, half), ordered):
        axis.text(1.02, height, text, transform=axis.transAxes, color=color, fontsize=9.5, va="center")


def spread(wanted: list[float], half: list[float]) -> list[float]:
    """Positions in [0, 1] near those wanted (ascending), of things that reach `half` to both sides without touching."""
    places = [min(max(place, 0.0), 1.0) for place in wanted]
    for _ in range(100):
        for i in range(len(places) - 1):
            overlap = half[i] + half[i + 1] - (places[i + 1] - places[i])
            if overlap > 1e-9:
                places[i] -= overlap / 2
                places[i + 1] += overlap / 2
        over = max(0.0, places[-1] + half[-1] - 1.05) if places else 0.0
        places = [place - over for place in places]
    return places


def style_axis(axis: Axes, name: str) -> None:
    """Only a grid, a line below and the name above."""
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(PALE)
    axis.tick_params(colors=GREY, labelsize=9, length=0, which="both")
    axis.grid(axis="y", color=PALE, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_title(name, loc="left", color=INK, fontsize=10, pad=6)


def log_ticks(axis: Axes) -> None:
    """Plain numbers on a logarithmic y axis, as many as there is room for."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axis.get_ylim()
    wide = high / low > 200.0
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())
