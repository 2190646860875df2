"""Begin a run, or go on with one; by one process or by several."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from flatprune import named
from flatprune.checkpoint import load_checkpoint
from flatprune.errors import InputError
from flatprune.files.lock import FolderLock, locked
from flatprune.runs.course import NoteObserver, go_on, made, resumed_trainer, save, threads_of, write_known
from flatprune.runs.folder import (
    CHECKPOINT_FILE,
    COMPARED_FOLDERS,
    check_free,
    holds_run,
    make_folder,
    read_settings,
    remove_run,
)
from flatprune.runs.found import checkpoint, finished, rename_damaged, resumed_settings
from flatprune.settings import Settings
from flatprune.signals import stop_signals
from flatprune.training.ranks import TrainingRanks, follow, joined, launch
from flatprune.training.trainer import Observer, Trainer
from kfac_ext.curvature.modes import RngState


def run(
    settings: Settings,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    wait: bool = False,
    rank_timeout: float | None = None,
    observer: NoteObserver = lambda title: Observer(),
) -> dict[str, Any]:
    """Train and prune as `settings` say, into the folder `out`.

    Started by `torchrun`, its processes share the training (docs/distributed.md): the first writes, all return this.
    Restarted by it (`--max-restarts`), it goes on from the checkpoint of that start.

    Args:
        settings: what to do.
        out: folder, made if it is not there.
        overwrite: replace the files of another run that are in `out`.
        wait: where another process works in `out`, wait for it instead of refusing.
        rank_timeout: seconds to wait for one of several processes that does not come; None: half an hour.
        observer: called with "dense" and "pruned", returns who is told about that part.

    Returns:
        The content of `summary.json`.

    Raises:
        InputError: something given cannot be used; nothing has been written.
        DivergedError: the loss is not finite any more; the last checkpoint is from before.
        Interrupted: a signal came that asks to end (SIGINT, SIGTERM, SIGHUP, SIGXCPU); `resume` goes on from the
            checkpoint.
        OSError: a file could not be written; the old one is still there.

    Example:
        >>> summary = run(Settings(data="digits", target_params=0.2, epochs=30), "runs/digits")
        >>> summary["params_after"] / summary["params_before"] <= 0.2 * 1.01
        True
    """
    named.allow(settings.model, settings.data)
    work = lambda: _run(settings, Path(out), overwrite, wait, observer)  # noqa: E731
    return _by_all_ranks(settings.device, rank_timeout, work)


def resume(
    out: str | os.PathLike[str],
    given: dict[str, Any] | None = None,
    *,
    restart_damaged: bool = False,
    wait: bool = False,
    rank_timeout: float | None = None,
    observer: NoteObserver = lambda title: Observer(),
) -> dict[str, Any]:
    """Go on with the run in the folder `out` from its checkpoint; on a CPU the result is the same bit for bit.

    Args:
        out: folder of the run.
        given: settings that the user named again; they must be those of the run (data and device may differ). Functions
            of one's own ("module:function") have to be: a file's word alone runs no code.
        restart_damaged: give a damaged checkpoint (or summary) the name `checkpoint.pt.damaged`, and make anew what was
            in it, from `settings.json`.
        wait: where another process works in `out`, wait for it instead of refusing.
        rank_timeout: as for `run`; the number of processes may differ from before.
        observer: as for `run`.

    Returns:
        The content of `summary.json`, at once where the run was finished already and all its files are whole.

    Raises:
        InputError: there is no checkpoint, or `given` or the data are not those of the checkpoint.
        DamagedError: the checkpoint is not what was written; nothing has been changed.
    """
    named.allow((given or {}).get("model"), (given or {}).get("data"))
    device = (given or {}).get("device", "cuda" if torch.cuda.is_available() else "cpu")
    work = lambda: _resume(Path(out), given or {}, restart_damaged, wait, observer)  # noqa: E731
    return _by_all_ranks(device, rank_timeout, work)


def _run(settings: Settings, folder: Path, overwrite: bool, wait: bool, observer: NoteObserver) -> dict[str, Any]:
    if _is_restarted(folder):
        return _resume(folder, {}, False, True, observer)
    check_free(folder, overwrite)
    with contextlib.ExitStack() as held:
        lock = held.enter_context(locked(folder, wait=wait)) if folder.is_dir() else None
        trainer = made(settings)
        if lock is None:
            make_folder(folder)
            lock = held.enter_context(locked(folder, wait=wait))
            check_free(folder, overwrite)  # another run may have begun meanwhile
        _take_compared(lock, settings, wait)
        remove_run(folder)
        save(trainer, folder, lock)
        return go_on(trainer, lock, observer, restart_damaged=False)


def _resume(
    folder: Path, given: dict[str, Any], restart_damaged: bool, wait: bool, observer: NoteObserver
) -> dict[str, Any]:
    if not holds_run(folder):
        raise InputError(f"{folder}: no {CHECKPOINT_FILE} to resume from")
    with locked(folder, wait=wait) as lock:
        aside: list[Path] | None = [] if restart_damaged else None
        summary = finished(folder, aside)
        if summary is not None:
            resumed_settings(folder, Settings.from_dict(read_settings(folder)), given or {})
            return summary
        trainer = _resumed(folder, given or {}, aside)
        _take_compared(lock, trainer.settings, wait)
        rename_damaged(aside)
        if not (folder / CHECKPOINT_FILE).is_file():
            save(trainer, folder, lock)
        write_known(trainer, folder)
        return go_on(trainer, lock, observer, restart_damaged=restart_damaged)


def _resumed(folder: Path, given: dict[str, Any], aside: list[Path] | None) -> Trainer:
    """The trainer where the checkpoint left it, or at the beginning where that is damaged or gone."""
    state = checkpoint(folder, aside)
    values = read_settings(folder) if state is None else state["settings"]
    settings = resumed_settings(folder, Settings.from_dict(values), given)
    return resumed_trainer(settings, state, folder)


def _take_compared(lock: FolderLock, settings: Settings, wait: bool) -> None:
    """Hold the folders of the networks that this run is compared with, and those that one before it has left."""
    compared = settings.compared()
    names = {inside for name, inside in COMPARED_FOLDERS.items() if name in compared or (lock.folder / inside).is_dir()}
    lock.take(sorted(names), wait=wait)


def _is_restarted(folder: Path) -> bool:
    """Whether torchrun has started this process again, and what is in the folder is of its first start."""
    start, restarts = launch()
    path = folder / CHECKPOINT_FILE
    return restarts > 0 and path.is_file() and load_checkpoint(path).get("launch") == start


def _by_all_ranks(device: str, timeout: float | None, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` gives, which only the first of several ranks does; the others train along."""
    with joined(device, timeout) as ranks:
        if ranks is None:
            return work()
        return ranks.lead(work) if ranks.leads else _follow(ranks)


def _follow(ranks: TrainingRanks) -> dict[str, Any]:
    streams: list[RngState] = []  # that a comparison must not change

    def make(settings: Settings, state: dict[str, Any] | None, before: Sequence[Trainer]) -> Trainer:
        settings = ranks.settings(settings)
        dataset = ranks.begin(settings, state, lambda: before[0].dataset if before else settings.dataset())
        streams[:] = [RngState.now(trainer.device) for trainer in before[:1]]
        return Trainer(settings, dataset, state, ranks)

    def train(trainer: Trainer) -> None:
        with threads_of(trainer):
            trainer.train(save=lambda: gathered(trainer), stop_requested=stop_requested)
        for kept in streams:
            kept.restore()

    def gathered(trainer: Trainer) -> None:
        trainer.state()

    with stop_signals() as stop_requested:
        return follow(ranks, make, train)
