"""Writes the tables of options in docs/training.md: `python -m tests.cli.make_options`."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from flatprune.cli.options import default_of, help_of, options_of, panel_of
from flatprune.settings import Settings

PAGE = Path(__file__).parents[2] / "docs/training.md"
BEGIN, END = "<!-- options, made by python -m tests.cli.make_options -->\n", "<!-- end of the options -->\n"


def tables() -> str:
    """The options under their headings, in Markdown."""
    parts = []
    for panel, fields in groupby(Settings.model_fields.items(), lambda item: panel_of(item[1])):
        lines = ["| option | default | what it does |", "| --- | --- | --- |"]
        for name, field in fields:
            option = options_of(name, field).partition("/")[0]
            default = "off" if field.annotation is bool else default_of(field) or "none"
            lines.append(f"| `{option}` | {default} | {help_of(field)} |")
        parts.append("\n".join([f"### {panel}", "", *lines]) + "\n\n")
    return "".join(parts)


def main() -> None:
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{tables()}{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
