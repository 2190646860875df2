"""The way of a run from where its trainer is to its last file: networks to compare with, training, what is written."""

from __future__ import annotations

import contextlib
import shlex
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from flatprune import named
from flatprune.data import Dataset
from flatprune.errors import DivergedError, InputError, Interrupted
from flatprune.export import MODEL_FILE, save_model
from flatprune.files.atomic import damaged
from flatprune.files.finished import HISTORY, HISTORY_FILE, SUMMARY_FILE, finish, read_history
from flatprune.files.lock import FolderLock
from flatprune.files.records import write_json_lines, write_record
from flatprune.files.sealed import save_sealed
from flatprune.reporting import report
from flatprune.runs.folder import (
    CHECKPOINT_FILE,
    COMPARED_FOLDERS,
    DIGESTED_FILES,
    SETTINGS,
    SETTINGS_FILE,
    kept_settings,
    same_run,
)
from flatprune.runs.found import checkpoint, finished, rename_damaged
from flatprune.runs.summary import summary_of, valleys_of
from flatprune.settings import Settings
from flatprune.signals import stop_signals
from flatprune.training.ranks import current_ranks
from flatprune.training.trainer import Observer, Trainer

# Multiply-accumulates a step: below, threads cost more than they give, and on busy cores twenty times as much.
_THREADED_WORK = 10**8
NoteObserver = Callable[[str], Observer]


def go_on(trainer: Trainer, lock: FolderLock, observer: NoteObserver, *, restart_damaged: bool) -> dict[str, Any]:
    """Train what is compared, then the network itself, from where it is; returns the summary."""
    folder = lock.folder
    try:
        with stop_signals() as stop_requested, threads_of(trainer):
            compared = {}
            devices = [trainer.device] if trainer.device.type == "cuda" else []
            for name, settings in trainer.settings.compared().items():
                with torch.random.fork_rng(devices):  # the comparison must not change what is compared
                    compared[name] = _compared_summary(
                        trainer, name, settings, lock, observer, stop_requested, restart_damaged
                    )
            return _train(trainer, folder, lock, observer("pruned"), stop_requested, compared)
    except Interrupted as error:
        own = {name: getattr(trainer.settings, name) for name in ("model", "data")}
        again = "".join(f" --{name} {value}" for name, value in own.items() if named.is_named(value))
        command = f"flatprune run --resume --out {shlex.quote(str(folder))}{again}"
        raise Interrupted(f"{error}; to go on: {command}") from None
    except DivergedError as error:
        raise DivergedError(f"{error}; the last good checkpoint is kept in {folder}") from None


def _compared_summary(
    pruned: Trainer,
    name: str,
    settings: Settings,
    lock: FolderLock,
    observer: NoteObserver,
    stop_requested: Callable[[], bool],
    restart_damaged: bool,
) -> dict[str, Any]:
    folder = lock.folder / COMPARED_FOLDERS[name]
    if not same_run(folder, settings.as_dict()):
        raise InputError(f"{folder / SETTINGS_FILE}: is of another run than the one to compare with")
    aside: list[Path] | None = [] if restart_damaged else None
    summary = finished(folder, aside)
    if summary is not None:
        return summary
    state = checkpoint(folder, aside) if (folder / CHECKPOINT_FILE).is_file() else None
    rename_damaged(aside)
    trainer = resumed_trainer(settings, state, folder, pruned.dataset)
    return _train(trainer, folder, lock, observer(COMPARED_FOLDERS[name].replace("-", " ")), stop_requested, {})


def _train(
    trainer: Trainer,
    folder: Path,
    lock: FolderLock,
    observer: Observer,
    stop_requested: Callable[[], bool],
    compared: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    trainer.train(observer, lambda: save(trainer, folder, lock), stop_requested)
    summary = summary_of(trainer, compared)
    if compared and trainer.settings.track_hessian != 0:
        summary["valleys"] = valleys_of(trainer, folder, {**compared, "pruned": summary})
    lock.hold()
    folder.mkdir(parents=True, exist_ok=True)
    write_known(trainer, folder)
    (folder / SUMMARY_FILE).unlink(missing_ok=True)  # of a finished run that lacked something
    save_model(folder / MODEL_FILE, trainer.result, trainer.arguments, trainer.dataset.normalization)
    dense_history = read_history(folder / COMPARED_FOLDERS["dense"] / HISTORY_FILE) if "dense" in compared else []
    _write_report(folder, summary, trainer.history, dense_history)
    finish(folder, summary, [name for name in DIGESTED_FILES if (folder / name).is_file()])
    return summary


def resumed_trainer(
    settings: Settings, state: dict[str, Any] | None, folder: Path, dataset: Dataset | None = None
) -> Trainer:
    """`made`, from the state of the checkpoint in a folder, which may not fit."""
    try:
        return made(settings, state, dataset)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        if state is None:
            raise
        raise damaged(folder / CHECKPOINT_FILE, f"its content does not fit: {error!r}") from error


def made(settings: Settings, state: dict[str, Any] | None = None, dataset: Dataset | None = None) -> Trainer:
    """The trainer of this process, or of the ranks that share the run; the data are those of the settings."""
    ranks = current_ranks()
    settings = settings if ranks is None else ranks.settings(settings)
    return Trainer(settings, dataset or settings.dataset(), state, ranks)


def save(trainer: Trainer, folder: Path, lock: FolderLock) -> None:
    """Write the checkpoint and what is made of it, in a folder that is made again where somebody removed it."""
    lock.hold()
    folder.mkdir(parents=True, exist_ok=True)
    save_sealed(folder / CHECKPOINT_FILE, trainer.state())
    write_known(trainer, folder)


def write_known(trainer: Trainer, folder: Path) -> None:
    """Write what the checkpoint tells too."""
    if kept_settings(folder) is None:
        write_record(folder / SETTINGS_FILE, SETTINGS, trainer.settings.as_dict())
    write_json_lines(folder / HISTORY_FILE, trainer.history, HISTORY)


def _write_report(folder: Path, summary: dict[str, Any], *histories: list[dict[str, Any]]) -> None:
    """Write the report; that it cannot be drawn (no place for fonts, a glyph that is missing) is no loss of results."""
    try:
        report.write_report(folder, summary, *histories)
    except Exception as error:
        if isinstance(error, OSError) and Path(error.filename or "").parent == folder:
            raise
        for name in (report.PLOT_FILE, report.VALLEYS_FILE, report.REPORT_FILE):
            (folder / name).unlink(missing_ok=True)
        warnings.warn(f"{folder}: the report could not be made ({error!r})", stacklevel=2)


@contextlib.contextmanager
def threads_of(trainer: Trainer) -> Iterator[None]:
    """As many threads inside as the settings say, or the network is worth."""
    before = torch.get_num_threads()
    small = trainer.macs_before * trainer.batch_size * 3 < _THREADED_WORK  # forward, and twice that backward
    torch.set_num_threads(trainer.settings.threads or (1 if small else before))
    try:
        yield
    finally:
        torch.set_num_threads(before)
