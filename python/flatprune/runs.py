"""A run in a folder: which files it makes, when it may start there, how it is interrupted and resumed.

Files of a run: `checkpoint.pt` (see `flatprune.checkpoint`), `settings.json`, `history.jsonl` (a line an epoch and a
line a removal), and at the end `model.pt` (see `flatprune.export`), `progress.png`, `report.html`, `digests.json` (see
`flatprune.files.finished`) and, last, `summary.json`; `dense/` holds the same for the network that is trained without
pruning, where that is wanted. Each file is written atomically, so that it is whole at any time, and all that a run
knows is in its checkpoint: the others are made of it, again too, when it is resumed. `lock` is held while it goes on.

`summary.json`:
    format, version                        "flatprune-summary", 1
    data, model, seed, epochs, steps, train_images, test_images, image_shape, classes: what was done
    class_names                            in the order of the outputs, null where the data have none
    target_params                          fraction of the parameters to reach, null for a target in another unit
    target_unit, target_fraction           params, macs, neurons or latency, and the fraction of it to reach
    held_out_images                        training images that only judged whether to go on pruning
    params_before, params_after            trainable scalars
    macs_before, macs_after                multiply-accumulates of matrix products and convolutions for one image
    test_accuracy_last, test_accuracy_best percent, after the last epoch and after the best of those tested
    train_accuracy_last                    percent, of the final network on its training images and (noisy) labels
    test_nll, test_ece                     calibration of the final network, see `flatprune.training.evaluation`
    corrupted_accuracy                     kind -> percent at strengths 1 to 5, with _mean beside it; where asked for
    latency_before_1, latency_after_1      ms an image, median, at batch size 1, and likewise at 128; where asked for
    spectral_radius_kfac                   max over layers of lambda_1(A) lambda_1(G); with _geometric_mean beside it
    hessian_lambda_max                     of the mean loss over the first 1,024 training images, batch norm folded
    widths_before, widths_after            layer name -> output channels or features
    cost_before, cost_after                of the network in the target's unit (latency: measured seconds)
    pruning_stopped                        why pruning ended before its time, null if it did not
    predicted_vs_measured                  change of the loss at the cuts, see `flatprune.pruning.predicted_vs_measured`
    seconds                                of training and testing, without start-up
    removal_seconds                        what removal events took of these
    ranks                                  of several processes: how many
    traffic                                by purpose: calls, bytes the first of these gave, seconds it waited
    dense_*, no_flatness_*                 the same of the network trained without pruning, or without the flatness
                                           term, where that was wanted
    valleys                                distances, and the loss at these along the Hessian's top eigenvector, of
                                           each of the networks compared (see `flatprune.loss_along_top_eigenvector`)
    settings, versions                     everything needed to do it again

With the setting `ema`, accuracies, calibration, Hessian and `model.pt` are those of the averaged weights; K-FAC's
factors are measured where the training is. An epoch's training loss is that of its targets, smoothed or mixed.
With the setting `validation`, "test" means the held-out part of the training images everywhere.

`history.jsonl`, by `kind`: "head" (the first line: format, version, number of records), "epoch" (losses, accuracies in
percent, those of an epoch not tested null, params, radii, seconds so far), "removal" (fields of
`flatprune.pruning.removals.Removal` without the neurons' indices; width and params are those after it), "event" (one
at which nothing was removed; the reason is its note), "stop" (the end of pruning before its time, likewise),
"optimum_shift" (a layer after the last removal: rank and number of its inputs, norm of its weight before and after).
"""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

from flatprune import named
from flatprune.checkpoint import load_checkpoint
from flatprune.data import Dataset, load_dataset
from flatprune.errors import DamagedError, DivergedError, InputError, Interrupted
from flatprune.export import MODEL_FILE, read_saved, save_model
from flatprune.files.atomic import damaged, put_aside
from flatprune.files.finished import (
    HISTORY,
    HISTORY_FILE,
    SUMMARY_FILE,
    finish,
    problems,
    read_history,
    read_summary,
)
from flatprune.files.lock import FolderLock, locked
from flatprune.files.records import write_json_lines, write_record
from flatprune.files.sealed import save_sealed
from flatprune.reporting import report
from flatprune.run_folder import (
    CHECKPOINT_FILE,
    COMPARED_FOLDERS,
    DIGESTED_FILES,
    SETTINGS,
    SETTINGS_FILE,
    check_free,
    holds_run,
    kept_settings,
    make_folder,
    read_settings,
    remove_run,
    same_run,
)
from flatprune.settings import Settings
from flatprune.signals import stop_signals
from flatprune.training.figures import results
from flatprune.training.measurements import valleys
from flatprune.training.ranks import TrainingRanks, current_ranks, follow, joined, launch
from flatprune.training.trainer import Observer, Trainer
from kfac_ext.curvature.modes import RngState

_TIMES = ("seconds", "removal_seconds")
TIMES = (*_TIMES, *(f"{name}_{time}" for name in COMPARED_FOLDERS for time in _TIMES))
"""Figures of a summary that no two runs have alike; of the records of a history the first."""
_COMPARED_KEYS = (
    "params_after",
    "macs_after",
    "test_accuracy_last",
    "test_accuracy_best",
    "train_accuracy_last",
    "spectral_radius_kfac",
    "hessian_lambda_max",
    "latency_after_1",
    *_TIMES,
)
_MAY_CHANGE = ("data", "device")  # on resuming: the data are known by their digest, the device is free
# Multiply-accumulates a step: below, threads cost more than they give, and on busy cores twenty times as much.
_THREADED_WORK = 10**8
_RESTART = "--restart-damaged puts it aside and makes anew what was in it"
_NoteObserver = Callable[[str], Observer]
_T = TypeVar("_T")


def run(
    settings: Settings,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    wait: bool = False,
    rank_timeout: float | None = None,
    observer: _NoteObserver = lambda title: Observer(),
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


def _run(settings: Settings, folder: Path, overwrite: bool, wait: bool, observer: _NoteObserver) -> dict[str, Any]:
    if _is_restarted(folder):
        return _resume(folder, {}, False, True, observer)
    check_free(folder, overwrite)
    with contextlib.ExitStack() as held:
        lock = held.enter_context(locked(folder, wait=wait)) if folder.is_dir() else None
        trainer = _made(settings, load)
        if lock is None:
            make_folder(folder)
            lock = held.enter_context(locked(folder, wait=wait))
            check_free(folder, overwrite)  # another run may have begun meanwhile
        _take_compared(lock, settings, wait)
        remove_run(folder)
        _save(trainer, folder, lock)
        return _go_on(trainer, lock, observer, restart_damaged=False)


def _take_compared(lock: FolderLock, settings: Settings, wait: bool) -> None:
    """Hold the folders of the networks that this run is compared with, and those that one before it has left."""
    compared = settings.compared()
    names = {inside for name, inside in COMPARED_FOLDERS.items() if name in compared or (lock.folder / inside).is_dir()}
    lock.take(sorted(names), wait=wait)


def resume(
    out: str | os.PathLike[str],
    given: dict[str, Any] | None = None,
    *,
    restart_damaged: bool = False,
    wait: bool = False,
    rank_timeout: float | None = None,
    observer: _NoteObserver = lambda title: Observer(),
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


def _resume(
    folder: Path, given: dict[str, Any], restart_damaged: bool, wait: bool, observer: _NoteObserver
) -> dict[str, Any]:
    if not holds_run(folder):
        raise InputError(f"{folder}: no {CHECKPOINT_FILE} to resume from")
    with locked(folder, wait=wait) as lock:
        aside: list[Path] | None = [] if restart_damaged else None
        summary = _finished(folder, aside)
        if summary is not None:
            _resumed_settings(folder, Settings.from_dict(read_settings(folder)), given or {})
            return summary
        trainer = _resumed(folder, given or {}, aside)
        _take_compared(lock, trainer.settings, wait)
        _put_aside(aside)
        if not (folder / CHECKPOINT_FILE).is_file():
            _save(trainer, folder, lock)
        _write_known(trainer, folder)
        return _go_on(trainer, lock, observer, restart_damaged=restart_damaged)


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
        dataset = ranks.begin(settings, state, lambda: before[0].dataset if before else load(settings))
        streams[:] = [RngState.now(trainer.device) for trainer in before[:1]]
        return Trainer(settings, dataset, state, ranks)

    def train(trainer: Trainer) -> None:
        with _threads(trainer):
            trainer.train(save=lambda: gathered(trainer), stop_requested=stop_requested)
        for kept in streams:
            kept.restore()

    def gathered(trainer: Trainer) -> None:
        trainer.state()

    with stop_signals() as stop_requested:
        return follow(ranks, make, train)


def _made(settings: Settings, data: Callable[[Settings], Dataset], state: dict[str, Any] | None = None) -> Trainer:
    """The trainer of this process, or of the ranks that share the run."""
    ranks = current_ranks()
    settings = settings if ranks is None else ranks.settings(settings)
    return Trainer(settings, data(settings), state, ranks)


def _is_restarted(folder: Path) -> bool:
    """Whether torchrun has started this process again, and what is in the folder is of its first start."""
    start, restarts = launch()
    checkpoint = folder / CHECKPOINT_FILE
    return restarts > 0 and checkpoint.is_file() and load_checkpoint(checkpoint).get("launch") == start


def is_finished(out: str | os.PathLike[str]) -> bool:
    """Whether the run in a folder is finished, with all its files whole."""
    folder = Path(out)
    try:
        return (folder / SUMMARY_FILE).is_file() and bool(read_summary(folder)) and not problems(folder)
    except InputError:
        return False


def _finished(folder: Path, aside: list[Path] | None) -> dict[str, Any] | None:
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


def _whole(path: Path, read: Callable[[], _T], aside: list[Path] | None) -> _T | None:
    """What `read` gives; None for a damaged file, which joins those to be put aside, where that is asked for."""
    try:
        return read()
    except DamagedError as error:
        if aside is None:
            raise DamagedError(f"{error}; {_RESTART}") from error
        aside.append(path)
        return None


def _put_aside(paths: list[Path] | None) -> None:
    for path in paths or []:
        warnings.warn(f"{path}: was damaged, and is now {put_aside(path).name}", stacklevel=2)


def _resumed(folder: Path, given: dict[str, Any], aside: list[Path] | None) -> Trainer:
    """The trainer where the checkpoint left it, or at the beginning where that is damaged or gone."""
    state = _checkpoint(folder, aside)
    values = read_settings(folder) if state is None else state["settings"]
    settings = _resumed_settings(folder, Settings.from_dict(values), given)
    return _trainer(settings, load, state, folder)


def _checkpoint(folder: Path, aside: list[Path] | None) -> dict[str, Any] | None:
    path = folder / CHECKPOINT_FILE
    if not path.is_file():
        if aside is not None:
            return None
        raise InputError(f"{folder}: no {CHECKPOINT_FILE} to resume from; --restart-damaged makes the run anew")
    state = _whole(path, lambda: load_checkpoint(path), aside)
    if state is not None and not same_run(folder, state["settings"]):
        raise InputError(f"{path}: is of another run than {SETTINGS_FILE}, whose settings differ")
    return state


def _trainer(
    settings: Settings, data: Callable[[Settings], Dataset], state: dict[str, Any] | None, folder: Path
) -> Trainer:
    try:
        return _made(settings, data, state)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        if state is None:
            raise
        raise damaged(folder / CHECKPOINT_FILE, f"its content does not fit: {error!r}") from error


def load(settings: Settings) -> Dataset:
    """The data set that a run with these settings trains and tests on."""
    return load_dataset(
        settings.data,
        seed=settings.seed,
        train_size=settings.train_size,
        validation=settings.validation,
        label_noise=settings.label_noise,
        image_size=settings.image_size,
        classes=settings.classes,
        device=settings.torch_device(),
    )


def _resumed_settings(folder: Path, settings: Settings, given: dict[str, Any]) -> Settings:
    for name, value in given.items():
        if name not in _MAY_CHANGE and value != getattr(settings, name):
            raise InputError(
                f"{folder}: the run to resume has {name} {getattr(settings, name)}, not {value}; "
                "leave it out, or start a run in another folder"
            )
    return settings.changed(**{name: value for name, value in given.items() if name in _MAY_CHANGE})


def _go_on(trainer: Trainer, lock: FolderLock, observer: _NoteObserver, *, restart_damaged: bool) -> dict[str, Any]:
    folder = lock.folder
    try:
        with stop_signals() as stop_requested, _threads(trainer):
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
    observer: _NoteObserver,
    stop_requested: Callable[[], bool],
    restart_damaged: bool,
) -> dict[str, Any]:
    folder = lock.folder / COMPARED_FOLDERS[name]
    if not same_run(folder, settings.as_dict()):
        raise InputError(f"{folder / SETTINGS_FILE}: is of another run than the one to compare with")
    aside: list[Path] | None = [] if restart_damaged else None
    summary = _finished(folder, aside)
    if summary is not None:
        return summary
    state = _checkpoint(folder, aside) if (folder / CHECKPOINT_FILE).is_file() else None
    _put_aside(aside)
    trainer = _trainer(settings, lambda _: pruned.dataset, state, folder)
    return _train(trainer, folder, lock, observer(COMPARED_FOLDERS[name].replace("-", " ")), stop_requested, {})


def _train(
    trainer: Trainer,
    folder: Path,
    lock: FolderLock,
    observer: Observer,
    stop_requested: Callable[[], bool],
    compared: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    trainer.train(observer, lambda: _save(trainer, folder, lock), stop_requested)
    summary = _summary(trainer, compared)
    if compared:
        summary["valleys"] = _valleys(trainer, folder, {**compared, "pruned": summary})
    lock.hold()
    folder.mkdir(parents=True, exist_ok=True)
    _write_known(trainer, folder)
    (folder / SUMMARY_FILE).unlink(missing_ok=True)  # of a finished run that lacked something
    save_model(folder / MODEL_FILE, trainer.result, trainer.arguments, trainer.dataset.normalization)
    dense_history = read_history(folder / COMPARED_FOLDERS["dense"] / HISTORY_FILE) if "dense" in compared else []
    _write_report(folder, summary, trainer.history, dense_history)
    finish(folder, summary, [name for name in DIGESTED_FILES if (folder / name).is_file()])
    return summary


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


def _save(trainer: Trainer, folder: Path, lock: FolderLock) -> None:
    """Write the checkpoint and what is made of it, in a folder that is made again where somebody removed it."""
    lock.hold()
    folder.mkdir(parents=True, exist_ok=True)
    save_sealed(folder / CHECKPOINT_FILE, trainer.state())
    _write_known(trainer, folder)


def _write_known(trainer: Trainer, folder: Path) -> None:
    """Write what the checkpoint tells too."""
    if kept_settings(folder) is None:
        write_record(folder / SETTINGS_FILE, SETTINGS, trainer.settings.as_dict())
    write_json_lines(folder / HISTORY_FILE, trainer.history, HISTORY)


def _valleys(trainer: Trainer, folder: Path, summaries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The loss along the Hessian's top eigenvector, of this network and of those that it is compared with."""
    networks = {
        name: read_saved(folder / COMPARED_FOLDERS[name]).network().to(trainer.device)
        if name in COMPARED_FOLDERS
        else trainer.result
        for name in summaries
    }
    sharpest = max(summary["hessian_lambda_max"] for summary in summaries.values())
    return valleys(networks, sharpest, trainer.dataset, trainer.settings.seed)


def _summary(trainer: Trainer, compared: dict[str, dict[str, Any]]) -> dict[str, Any]:
    settings = trainer.settings
    summary = {
        "data": settings.data,
        "model": settings.model,
        "seed": settings.seed,
        "epochs": settings.epochs,
        "target_params": settings.target_params,
        "steps": trainer.total_steps,
        "train_images": len(trainer.dataset.x_train),
        "held_out_images": 0 if trainer.guard is None else len(trainer.guard.x),
        "test_images": len(trainer.dataset.x_test),
        "image_shape": list(trainer.dataset.image_shape),
        "classes": trainer.dataset.classes,
        "class_names": trainer.dataset.class_names and list(trainer.dataset.class_names),
        **results(trainer),
        **trainer.traffic(),
    }
    for name, other in compared.items():
        for key in _COMPARED_KEYS:
            if key in other:
                summary[f"{name}_{key.replace('_after', '')}"] = other[key]
    summary["settings"] = {
        **settings.as_dict(),
        "lr": trainer.peak_lr,
        "weight_decay": settings.decay_in_use,
    }
    summary["versions"] = versions()
    return summary


def versions() -> dict[str, str]:
    """Versions of this package, of Python and of what the figures depend on."""
    found = {"python": platform.python_version()}
    for name in ("kfac-ext", "torch", "numpy", "scikit-learn"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@contextlib.contextmanager
def _threads(trainer: Trainer) -> Iterator[None]:
    before = torch.get_num_threads()
    small = trainer.macs_before * trainer.batch_size * 3 < _THREADED_WORK  # forward, and twice that backward
    torch.set_num_threads(trainer.settings.threads or (1 if small else before))
    try:
        yield
    finally:
        torch.set_num_threads(before)
