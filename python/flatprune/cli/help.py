"""The help of a command with many options: plain text under headings, in as many columns as there are."""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperCommand, TyperOption

_SWITCH = re.compile(r"^--(\S+) / --no-\1$")


class PanelCommand(TyperCommand):
    """A command whose help has a heading for each `rich_help_panel`; a box of rich's leaves 80 columns no room."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(ctx):
            if isinstance(option, TyperOption) and (record := option.get_help_record(ctx)) is not None:
                names, text = record
                panels.setdefault(option.rich_help_panel or "Help", []).append((_SWITCH.sub(r"--[no-]\1", names), text))
        for panel, records in panels.items():
            with formatter.section(panel):
                formatter.write_dl(records, col_max=28)
