"""`pruning.pt` beside a trainer's own checkpoint: what pruning needs to go on, sealed and with a format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flatprune.errors import InputError
from flatprune.files.sealed import load_sealed, save_sealed

STATE_FILE = "pruning.pt"
FORMAT, VERSION = "flatprune-pruning", 1


def save_state(folder: Path, pruning: Mapping[str, Any], **beside: Any) -> None:
    """Write the state of a `PruneWhileTraining`, and plain values beside it."""
    save_sealed(folder / STATE_FILE, {"format": FORMAT, "version": VERSION, **beside, "pruning": dict(pruning)})


def load_state(folder: Path, trainer: str) -> dict[str, Any]:
    """What `save_state` wrote, on the CPU.

    Raises:
        InputError: there is none; the message asks whether `trainer` made the checkpoint. It is of another format.
        DamagedError: it is not what was written.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise InputError(f"{path}: no such file; was the checkpoint beside it made by {trainer}?")
    return load_sealed(path, FORMAT, VERSION)
