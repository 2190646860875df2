"""`flatprune study` in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from typing import NamedTuple


class Outcome(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "flatprune", "study", *map(str, arguments)]


def call(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    """`flatprune study` in a process of its own."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=900, **options)
