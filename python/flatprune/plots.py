"""What all figures share: colours, the look of an axis, the bytes of a PNG."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, PALE = "#1f2430", "#7a8194", "#e6e8ef"
BLUE, TEAL, ROSE = "#2f5bea", "#0f9b8e", "#d6456b"
_DPI = 200


def style_axis(axis: Axes, name: str) -> None:
    """Take away all but the data, a baseline and pale lines of height; `name` stands above."""
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(PALE)
    axis.tick_params(colors=GREY, labelsize=9, length=0, which="both")
    axis.grid(axis="y", color=PALE, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_title(name, loc="left", color=INK, fontsize=10, pad=6)


def png(plot: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    plot.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()
