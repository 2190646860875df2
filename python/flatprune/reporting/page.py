"""Pieces of the HTML pages: one style, and pages that need nothing but themselves."""

from __future__ import annotations

import base64
import html
from typing import Any


def document(title: str, subtitle: str, body: str) -> str:
    """A whole page: the title and a line below it, then `body`, which is HTML."""
    title, subtitle = html.escape(title), html.escape(subtitle)
    return _DOCUMENT.format(title=title, subtitle=subtitle, body=body, style=_STYLE)


def figure_of(image: bytes, alt: str) -> str:
    """A PNG inside the page."""
    data = base64.b64encode(image).decode()
    return f'<figure><img alt="{html.escape(alt)}" src="data:image/png;base64,{data}"></figure>'


def card(name: str, value: str, note: str) -> str:
    """A figure with its name above it and a note below."""
    return f'<div class="card"><h2>{html.escape(name)}</h2><b>{html.escape(value)}</b><p>{html.escape(note)}</p></div>'


def value_rows(values: dict[str, Any]) -> str:
    """Rows of a table of two columns: names and plain values."""
    return "".join(
        f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(_plain(value))}</td></tr>"
        for name, value in values.items()
    )


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value) or "none"
    return "default" if value is None else str(value)


def number(value: float | None) -> str:
    """Three digits of a number that may be missing or not finite."""
    return "not finite" if value is None or value - value != 0.0 else f"{value:.3g}"


def duration(value: float) -> str:
    """A time for people."""
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{value:.1f} s"


_DOCUMENT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body><main>
<h1>{title}</h1><p>{subtitle}</p>
{body}
</main></body>
</html>
"""

_STYLE = """:root { color-scheme: light; --ink: #1f2430; --grey: #6b7285; --pale: #e6e8ef; }
:root { --teal: #0f9b8e; --ground: #f6f7fa; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { margin: 0; font-size: 1.6rem; line-height: 1.25; }
h1 + p { margin: .3rem 0 1.6rem; color: var(--grey); }
h3 { margin: 2.2rem 0 .6rem; font-size: 1.05rem; }
.cards { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); }
.card, figure, table { background: white; border: 1px solid var(--pale); border-radius: 10px; }
.card { padding: .9rem 1.1rem; }
.card h2 { margin: 0; font-size: .82rem; font-weight: 500; color: var(--grey); }
.card b { font-size: 1.55rem; font-variant-numeric: tabular-nums; }
.card p { margin: 0; font-size: .85rem; color: var(--grey); font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0 0; padding: .6rem; }
img { display: block; width: 100%; height: auto; }
table { width: 100%; border-collapse: separate; border-spacing: 0; padding: .3rem 0; }
th, td { padding: .28rem 1rem; text-align: left; font-size: .88rem; font-variant-numeric: tabular-nums; }
th { color: var(--grey); font-weight: 500; }
.values td:last-child { width: 60%; overflow-wrap: anywhere; }
.bar { height: .7rem; min-width: 2px; background: var(--pale); border-radius: 3px; }
.bar i { display: block; height: 100%; background: var(--teal); border-radius: 3px; }
.wide { overflow-x: auto; }
pre { overflow-x: auto; padding: .9rem 1.1rem; }
pre { background: white; border: 1px solid var(--pale); border-radius: 10px; }
code { background: white; border: 1px solid var(--pale); border-radius: 5px; padding: .1rem .35rem; }
"""
