"""JSON that is whole or as it was, tables of Markdown, generated parts of pages; nothing but the standard library."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Replace a file at once, so that none reads half of it and none is lost."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(path.name + ".half")
    half.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(half, path)


def table(head: Sequence[str], rows: Iterable[Sequence[object]], align: str = "lr") -> Iterator[str]:
    """The lines of a table; `align` has an l or an r for each column, of which the last holds for those that follow."""
    rules = [" ---: " if align[min(i, len(align) - 1)] == "r" else " --- " for i in range(len(head))]
    yield f"| {' | '.join(head)} |"
    yield f"|{'|'.join(rules)}|"
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"


def replace_between(path: Path, marker: str, text: str) -> None:
    """Put `text` between the two lines `<!-- marker -->` of a file."""
    line = f"<!-- {marker} -->"
    before, _, after = path.read_text().split(line)
    path.write_text(f"{before}{line}\n{text}\n{line}{after}")
