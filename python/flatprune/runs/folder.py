"""The folder of a run: what is in it, whether a run may begin there, whether its files are whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from flatprune.checkpoint import load_checkpoint
from flatprune.errors import InputError
from flatprune.export import EXPORT_FILES, EXPORTS_FILE, MODEL_FILE, check_export, read_exports, read_saved
from flatprune.files.atomic import DAMAGED_SUFFIX, TEMPORARY_SUFFIX
from flatprune.files.finished import (
    DIGESTS_FILE,
    HISTORY_FILE,
    SUMMARY_FILE,
    read_digests,
    read_history,
    read_summary,
    wrong_files,
)
from flatprune.files.records import Kind, read_record
from flatprune.reporting import report

CHECKPOINT_FILE = "checkpoint.pt"
SETTINGS_FILE = "settings.json"
SETTINGS = Kind("flatprune-settings", 1)
COMPARED_FOLDERS = {"dense": "dense", "no_flatness": "no-flatness"}  # of `flatprune.settings.Settings.compared`
DIGESTED_FILES = (HISTORY_FILE, SETTINGS_FILE, MODEL_FILE, report.PLOT_FILE, report.VALLEYS_FILE, report.REPORT_FILE)
RUN_FILES = (SUMMARY_FILE, DIGESTS_FILE, *DIGESTED_FILES, CHECKPOINT_FILE)  # in the order in which they are removed
WHOLE = "whole"
PUT_ASIDE, LEFT_BEHIND = "put aside", "left by a process that was killed"
NOT_CHECKED = "not checked, since its digest is not known"
FINE = (WHOLE, PUT_ASIDE, LEFT_BEHIND, NOT_CHECKED)
_FREE = ("data", "device", "threads", "architecture_of")  # where things are, and where they are computed


def check_free(folder: Path, overwrite: bool) -> None:
    """Raise InputError where `folder` cannot be a folder, or holds a run that `overwrite` does not allow to replace."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file, expected a folder for the results")
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"{folder}: cannot be written to ({nearest} is not a folder that this user may write to)")
    found = [name for name in _run_files() if (folder / name).exists()]
    if found and not overwrite:
        raise InputError(
            f"{folder}: holds a run already ({found[0]}); say --resume to go on with it, --overwrite to replace it"
        )


def make_folder(folder: Path) -> None:
    """Make the folder; InputError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror})") from error


def remove_run(folder: Path) -> None:
    """Remove the files of a run: those that say that it is finished first, its checkpoint last."""
    for name in _run_files():
        (folder / name).unlink(missing_ok=True)


def _run_files() -> list[str]:
    names = (*EXPORT_FILES, EXPORTS_FILE, *RUN_FILES)  # exports of another run's network must not outlive it
    return [*names, *(f"{folder}/{name}" for folder in COMPARED_FOLDERS.values() for name in names)]


def read_settings(folder: Path) -> dict[str, Any]:
    """The content of `settings.json`; InputError where it cannot be used."""
    return read_record(folder / SETTINGS_FILE, SETTINGS)


def kept_settings(folder: Path) -> dict[str, Any] | None:
    """The content of `settings.json`, or None where it has to be written again."""
    try:
        return read_settings(folder)
    except InputError:
        return None


def holds_run(folder: Path) -> bool:
    """Whether there are files of a run in a folder."""
    return any((folder / name).exists() for name in RUN_FILES)


def check_run(folder: Path) -> dict[str, str]:
    """File -> "whole", or what is wrong with it, of all files of a run that are there or ought to be.

    Raises:
        InputError: there is no run in `folder`.
    """
    if not holds_run(folder):
        raise InputError(f"{folder}: holds no run (none of {', '.join(RUN_FILES)})")
    names = (*RUN_FILES, *EXPORT_FILES, EXPORTS_FILE)
    found = {name: _state(folder, name) for name in names if (folder / name).exists()}
    if found.get(DIGESTS_FILE, WHOLE) != WHOLE and SUMMARY_FILE in found:
        found[SUMMARY_FILE] = NOT_CHECKED
    found |= _missing(folder)
    found |= _compared(folder, found)
    for path in sorted(folder.iterdir()):
        if path.suffix in (DAMAGED_SUFFIX, TEMPORARY_SUFFIX):
            found[path.name] = PUT_ASIDE if path.suffix == DAMAGED_SUFFIX else LEFT_BEHIND
    for inside in COMPARED_FOLDERS.values():
        if holds_run(folder / inside):
            found |= {f"{inside}/{name}": state for name, state in check_run(folder / inside).items()}
    return found


def _missing(folder: Path) -> dict[str, str]:
    """What ought to be there: a checkpoint as long as the run goes on, a summary once it has ended."""
    has = {name: (folder / name).exists() for name in RUN_FILES}
    found = {}
    if has[DIGESTS_FILE] and not has[SUMMARY_FILE]:
        found[SUMMARY_FILE] = "is missing; --resume makes it again"
    if has[SUMMARY_FILE] and not has[DIGESTS_FILE]:
        found[DIGESTS_FILE] = "is missing"
    if not has[SUMMARY_FILE] and not has[CHECKPOINT_FILE]:
        found[CHECKPOINT_FILE] = "is missing; --restart-damaged makes the run anew"
    return found


def _state(folder: Path, name: str) -> str:
    """Of a file by itself."""
    readers = {
        SUMMARY_FILE: lambda: read_summary(folder),
        DIGESTS_FILE: lambda: read_digests(folder),
        HISTORY_FILE: lambda: read_history(folder / name),
        SETTINGS_FILE: lambda: read_settings(folder),
        EXPORTS_FILE: lambda: read_exports(folder),
        CHECKPOINT_FILE: lambda: load_checkpoint(folder / name),
        MODEL_FILE: lambda: _check_network(folder / name),
    }
    try:
        if name in EXPORT_FILES:
            check_export(folder / name)
        elif name in readers:
            readers[name]()
    except InputError as error:
        return str(error)
    return WHOLE


def _check_network(path: Path) -> None:
    """Build the network, unless code of the user's own makes it, which checking does not run."""
    saved = read_saved(path)
    if not saved.is_own:
        saved.network()


def _compared(folder: Path, found: dict[str, str]) -> dict[str, str]:
    """What files say of each other: digests of a finished run, and whether all are of one run."""
    wrong: dict[str, str] = {}
    if found.get(DIGESTS_FILE) == WHOLE and SUMMARY_FILE in found:
        wrong |= by_digests(folder, DIGESTS_FILE, read_digests(folder))
    if found.get(EXPORTS_FILE) == WHOLE:
        there = {name: digest for name, digest in read_exports(folder).items() if found.get(name) == WHOLE}
        wrong |= by_digests(folder, EXPORTS_FILE, there)
    if found.get(CHECKPOINT_FILE) == WHOLE:
        state = load_checkpoint(folder / CHECKPOINT_FILE)
        if not same_run(folder, state.get("settings", {})):
            wrong[CHECKPOINT_FILE] = f"{folder / CHECKPOINT_FILE}: is of another run than {SETTINGS_FILE}"
    return wrong


def by_digests(folder: Path, listing: str, digests: dict[str, str]) -> dict[str, str]:
    """What is wrong with listed files; where most of them are another's, it is the list that is."""
    wrong = wrong_files(folder, listing, digests)
    there = [name for name in digests if (folder / name).exists()]
    others = [name for name in there if name in wrong]
    if len(others) > max(len(there) / 2, 1):
        told = f"{folder / listing}: is of other files, {len(others)} of its {len(digests)} digests are of none here"
        return {**wrong, **dict.fromkeys(others, NOT_CHECKED), listing: told}
    return wrong


def same_run(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether these are the settings in `settings.json`, but for those that do not make another run."""
    kept = kept_settings(folder)
    return kept is None or all(settings.get(name) == value for name, value in kept.items() if name not in _FREE)
