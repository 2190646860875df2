"""Files that are either the old ones or the new ones, whatever happens while they are written.

`checkpoint.pt` is a dict of plain numbers, strings, lists and tensors (`torch.load(weights_only=True)` reads it):

    format "flatprune-checkpoint", version, settings, data_digest,
    progress (epoch, step, order of the samples, sums of the running epoch, seconds, best accuracy), history,
    model, ema, optimizer, scaler, curvature, flatness, sam, disout, pruner (their state dicts, None where there is
    none), rng (states of all generators).

The learning rate is a function of the step, so that there is no scheduler state besides `progress`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import torch

from flatprune.errors import InputError

CHECKPOINT_FORMAT = "flatprune-checkpoint"
CHECKPOINT_VERSION = 1


def write_atomically(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Replace the file at `path` by `content`, or leave it as it was.

    Writes `path` + ".tmp" in the same folder, flushes it to the disk, renames it over `path`, and flushes the folder,
    so that a full disk, a killed process or a power cut leaves the old file or the new one, never half of one.

    Raises:
        OSError: the file could not be written; the old one is untouched and the temporary file is removed.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")  # one fixed name: a killed process leaves at most one behind
    data = content.encode() if isinstance(content, str) else content
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            reason = f"cannot be saved ({error.strerror}); what was there before is kept"
            raise OSError(error.errno, reason, str(path)) from error
        raise
    sync(path.parent)


def sync(path: str | os.PathLike[str]) -> None:
    """Flush a file, or the names in a folder, to the disk where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_atomically(path: str | os.PathLike[str], state: Any) -> None:
    """`torch.save(state)` through `write_atomically`.

    The bytes are made in memory first: `torch.save` into a file hides the reason when the disk is full.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON through `write_atomically`; NaN and infinities become null."""
    write_atomically(path, json.dumps(finite(value), indent=2) + "\n")


def write_json_lines(path: str | os.PathLike[str], records: list[dict[str, Any]]) -> None:
    """Write one JSON object a line through `write_atomically`; NaN and infinities become null."""
    write_atomically(path, "".join(json.dumps(finite(record)) + "\n" for record in records))


def finite(value: Any) -> Any:
    """The same nested value with None for numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and value - value != 0.0:
        return None
    return value


def load_checkpoint(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a `checkpoint.pt`.

    Raises:
        InputError: there is no such file, it is not a checkpoint of this package, or of a version unknown here.
    """
    state = read_torch_file(path, CHECKPOINT_FORMAT, device)
    if state["version"] != CHECKPOINT_VERSION:
        raise InputError(f"{path}: checkpoint version {state['version']}, this package reads {CHECKPOINT_VERSION}")
    return state


def read_torch_file(path: str | os.PathLike[str], expected_format: str, device: torch.device | str) -> dict[str, Any]:
    """`torch.load(weights_only=True)` of a dict that carries `expected_format`, with errors that name the file."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a damaged file
        raise InputError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != expected_format:
        raise InputError(f"{path}: format is {found!r}, expected {expected_format!r}")
    return state
