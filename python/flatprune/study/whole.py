"""Whether the files of a study, and of its runs, are whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from flatprune.errors import InputError
from flatprune.files.finished import SUMMARY_FILE
from flatprune.files.records import read_record
from flatprune.runs.folder import WHOLE, by_digests, check_run, holds_run
from flatprune.study.plan import DATA, DATA_FILE, FAILURE, FAILURE_FILE, RUNS_FOLDER
from flatprune.study.report import PAGE_FILE, RESULTS, RESULTS_FILE, RUNS_FILE, STUDY_FILE, open_study


def check_folder(folder: Path) -> dict[str, str]:
    """File -> "whole", or what is wrong with it, of a run's or a study's folder.

    Raises:
        InputError: the folder is neither.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    return (
        _check_study(folder) if (folder / STUDY_FILE).exists() or (folder / DATA_FILE).exists() else check_run(folder)
    )


def _check_study(folder: Path) -> dict[str, str]:
    found = {DATA_FILE: _state(lambda: read_record(folder / DATA_FILE, DATA))}
    found[STUDY_FILE] = _state(lambda: open_study(folder)) if found[DATA_FILE] == WHOLE else "not checked"
    if any((folder / name).exists() for name in (RESULTS_FILE, PAGE_FILE, RUNS_FILE)):
        told = found[STUDY_FILE]
        found |= _check_report(folder)
        if found[DATA_FILE] == WHOLE != told and found[STUDY_FILE] == WHOLE:
            found[DATA_FILE] = f"{folder / DATA_FILE}: does not fit {STUDY_FILE} ({told})"
    for run in sorted(path for path in (folder / RUNS_FOLDER).glob("*") if path.is_dir()):
        prefix = f"{RUNS_FOLDER}/{run.name}"
        if (run / FAILURE_FILE).exists() and not (run / SUMMARY_FILE).exists():
            found[f"{prefix}/{FAILURE_FILE}"] = _state(partial(read_record, run / FAILURE_FILE, FAILURE))
        if holds_run(run):
            found |= {f"{prefix}/{name}": state for name, state in check_run(run).items()}
    return found


def _check_report(folder: Path) -> dict[str, str]:
    """The files of the report, by the digests in its results."""
    try:
        digests = read_record(folder / RESULTS_FILE, RESULTS)["files"]
    except InputError as error:
        return {RESULTS_FILE: str(error)}
    return dict.fromkeys([RESULTS_FILE, *digests], WHOLE) | by_digests(folder, RESULTS_FILE, digests)


def _state(read: Callable[[], object]) -> str:
    try:
        read()
    except InputError as error:
        return str(error)
    return WHOLE
