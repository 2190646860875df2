"""What a run that goes on finds in its folder: a summary, a checkpoint, or what is damaged and put aside."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from flatprune.checkpoint import load_checkpoint
from flatprune.errors import DamagedError, InputError
from flatprune.files.atomic import put_aside
from flatprune.files.finished import SUMMARY_FILE, problems, read_summary
from flatprune.runs.folder import CHECKPOINT_FILE, SETTINGS_FILE, same_run
from flatprune.settings import Settings

_MAY_CHANGE = ("data", "device")  # on resuming: the data are known by their digest, the device is free
_RESTART = "--restart-damaged puts it aside and makes anew what was in it"
_T = TypeVar("_T")


def is_finished(out: str | os.PathLike[str]) -> bool:
    """Whether the run in a folder is finished, with all its files whole."""
    folder = Path(out)
    try:
        return (folder / SUMMARY_FILE).is_file() and bool(read_summary(folder)) and not problems(folder)
    except InputError:
        return False


def finished(folder: Path, aside: list[Path] | None) -> dict[str, Any] | None:
    """The summary of a finished run; None where it has to go on, or to make some of its files again."""
    if not (folder / SUMMARY_FILE).is_file():
        return None
    summary = _whole(folder / SUMMARY_FILE, lambda: read_summary(folder), aside)
    wrong = [] if summary is None else problems(folder)
    if not wrong:
        return summary
    if not (folder / CHECKPOINT_FILE).is_file():
        raise DamagedError(f"{wrong[0]}, and there is no {CHECKPOINT_FILE} to make it again from")
    warnings.warn(f"{wrong[0]}; it is made again from {CHECKPOINT_FILE}", stacklevel=2)
    return None


def checkpoint(folder: Path, aside: list[Path] | None) -> dict[str, Any] | None:
    """The state to go on from; None for a damaged or missing one, which joins those to be put aside."""
    path = folder / CHECKPOINT_FILE
    if not path.is_file():
        if aside is not None:
            return None
        raise InputError(f"{folder}: no {CHECKPOINT_FILE} to resume from; --restart-damaged makes the run anew")
    state = _whole(path, lambda: load_checkpoint(path), aside)
    if state is not None and not same_run(folder, state["settings"]):
        raise InputError(f"{path}: is of another run than {SETTINGS_FILE}, whose settings differ")
    return state


def resumed_settings(folder: Path, settings: Settings, given: dict[str, Any]) -> Settings:
    """The settings of the run in a folder, with what the user named again; InputError where that is another."""
    for name, value in given.items():
        if name not in _MAY_CHANGE and value != getattr(settings, name):
            raise InputError(
                f"{folder}: the run to resume has {name} {getattr(settings, name)}, not {value}; "
                "leave it out, or start a run in another folder"
            )
    return settings.changed(**{name: value for name, value in given.items() if name in _MAY_CHANGE})


def rename_damaged(paths: list[Path] | None) -> None:
    """Put damaged files aside, and say so."""
    for path in paths or []:
        warnings.warn(f"{path}: was damaged, and is now {put_aside(path).name}", stacklevel=2)


def _whole(path: Path, read: Callable[[], _T], aside: list[Path] | None) -> _T | None:
    """What `read` gives; None for a damaged file, which joins those to be put aside, where that is asked for."""
    try:
        return read()
    except DamagedError as error:
        if aside is None:
            raise DamagedError(f"{error}; {_RESTART}") from error
        aside.append(path)
        return None
