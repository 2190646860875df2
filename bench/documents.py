"""Generated parts of documents."""

from __future__ import annotations

from pathlib import Path


def replace_between(path: Path, marker: str, text: str) -> None:
    """Put `text` between the two lines `<!-- marker -->` of a file."""
    line = f"<!-- {marker} -->"
    before, _, after = path.read_text().split(line)
    path.write_text(f"{before}{line}\n{text}\n{line}{after}")
