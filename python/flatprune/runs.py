"""A run in a folder: which files it makes, when it may start there, how it is interrupted and resumed.

Files of a run: `checkpoint.pt` (see `flatprune.checkpoint`), `history.jsonl` (a line an epoch and a line a removal),
and at the end `model.pt` (see `flatprune.export`), `progress.png`, `report.html` and, last, `summary.json`; `dense/`
holds the same for the network that is trained without pruning, where that is wanted.
Each file is written atomically, so that it is whole at any time.

`summary.json`:
    data, model, seed, epochs, steps, train_images, test_images, image_shape, classes: what was done
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
    dense_*                                the same of the network trained without pruning, where that was wanted
    settings, versions                     everything needed to do it again

With the setting `ema`, accuracies, calibration, Hessian and `model.pt` are those of the averaged weights; K-FAC's
factors are measured where the training is. An epoch's training loss is that of its targets, smoothed or mixed.
With the setting `validation`, "test" means the held-out part of the training images everywhere.

`history.jsonl`, by `kind`: "epoch" (losses, accuracies in percent, those of an epoch not tested null, params, radii,
seconds so far), "removal" (fields of
`flatprune.pruning.removals.Removal` without the neurons' indices; width and params are those after it), "event" (one at
which nothing was removed; the reason is its note), "stop" (the end of pruning before its time, likewise),
"optimum_shift" (a layer after the last removal: rank and number of its inputs, norm of its weight before and after).
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from flatprune.checkpoint import load_checkpoint, save_atomically, write_json, write_json_lines
from flatprune.data import Dataset, Images, load_dataset, read_images
from flatprune.errors import DivergedError, InputError, Interrupted
from flatprune.export import EXPORT_FILES, MODEL_FILE, save_model
from flatprune.export import load as load_network
from flatprune.reporting import report
from flatprune.settings import Settings
from flatprune.training.evaluation import evaluate
from flatprune.training.figures import results
from flatprune.training.trainer import Observer, Trainer

CHECKPOINT_FILE = "checkpoint.pt"
HISTORY_FILE = "history.jsonl"
SUMMARY_FILE = "summary.json"
DENSE_FOLDER = "dense"
RUN_FILES = (CHECKPOINT_FILE, HISTORY_FILE, SUMMARY_FILE, MODEL_FILE, report.PLOT_FILE, report.REPORT_FILE)
_DENSE_KEYS = (
    "params_after",
    "macs_after",
    "test_accuracy_last",
    "test_accuracy_best",
    "train_accuracy_last",
    "spectral_radius_kfac",
    "hessian_lambda_max",
    "seconds",
)
_MAY_CHANGE = ("data", "device")  # on resuming: the data are known by their digest, the device is free
# Multiply-accumulates a step: below, threads cost more than they give, and on busy cores twenty times as much.
_THREADED_WORK = 10**8
_NoteObserver = Callable[[str], Observer]


def run(
    settings: Settings,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    observer: _NoteObserver = lambda title: Observer(),
) -> dict[str, Any]:
    """Train and prune as `settings` say, into the folder `out`.

    Args:
        settings: what to do.
        out: folder, made if it is not there.
        overwrite: replace the files of another run that are in `out`.
        observer: called with "dense" and "pruned", returns who is told about that part.

    Returns:
        The content of `summary.json`.

    Raises:
        InputError: something given cannot be used; nothing has been written.
        DivergedError: the loss is not finite any more; the last checkpoint is from before.
        Interrupted: SIGINT or SIGTERM came; `resume` goes on from the checkpoint.
        OSError: a file could not be written; the old one is still there.

    Example:
        >>> summary = run(Settings(data="digits", target_params=0.2, epochs=30), "runs/digits")
        >>> summary["params_after"] / summary["params_before"] <= 0.2
        True
    """
    folder = Path(out)
    check_free(folder, overwrite)
    dataset = load(settings)
    trainer = Trainer(settings, dataset)
    _make_folder(folder)
    for name in _run_files():
        (folder / name).unlink(missing_ok=True)
    _save(trainer, folder)
    return _go_on(trainer, folder, observer)


def resume(
    out: str | os.PathLike[str],
    given: dict[str, Any] | None = None,
    *,
    observer: _NoteObserver = lambda title: Observer(),
) -> dict[str, Any]:
    """Go on with the run in the folder `out` from its checkpoint; on a CPU the result is the same bit for bit.

    Args:
        out: folder of the run.
        given: settings that the user named again; they must be those of the checkpoint (data and device may differ).
        observer: as for `run`.

    Returns:
        The content of `summary.json`, at once where the run was finished already.

    Raises:
        InputError: there is no checkpoint, or `given` or the data are not those of the checkpoint.
    """
    folder = Path(out)
    if not (folder / CHECKPOINT_FILE).is_file():
        raise InputError(f"{folder}: no {CHECKPOINT_FILE} to resume from")
    state = load_checkpoint(folder / CHECKPOINT_FILE)
    settings = _resumed_settings(folder, Settings.from_dict(state["settings"]), given or {})
    if (folder / SUMMARY_FILE).is_file():
        return json.loads((folder / SUMMARY_FILE).read_text())
    return _go_on(Trainer(settings, load(settings), state), folder, observer)


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


def _run_files() -> list[str]:
    names = (*RUN_FILES, *EXPORT_FILES)  # exports of another run's network must not outlive it
    return [*names, *(f"{DENSE_FOLDER}/{name}" for name in names)]


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


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror})") from error


def _resumed_settings(folder: Path, settings: Settings, given: dict[str, Any]) -> Settings:
    for name, value in given.items():
        if name not in _MAY_CHANGE and value != getattr(settings, name):
            raise InputError(
                f"{folder}: the run to resume has {name} {getattr(settings, name)}, not {value}; "
                "leave it out, or start a run in another folder"
            )
    return replace(settings, **{name: value for name, value in given.items() if name in _MAY_CHANGE})


def _go_on(trainer: Trainer, folder: Path, observer: _NoteObserver) -> dict[str, Any]:
    try:
        with stop_signals() as stop_requested, _threads(trainer):
            dense = None
            if trainer.settings.compare_dense:
                devices = [trainer.device] if trainer.device.type == "cuda" else []
                with torch.random.fork_rng(devices):  # the comparison must not change what is compared
                    dense = _dense_summary(trainer, folder / DENSE_FOLDER, observer, stop_requested)
            return _train(trainer, folder, observer("pruned"), stop_requested, dense)
    except Interrupted as error:
        raise Interrupted(f"{error}; to go on: flatprune run --resume --out {folder}") from None
    except DivergedError as error:
        raise DivergedError(f"{error}; the last good checkpoint is kept in {folder}") from None


def _dense_summary(
    pruned: Trainer, folder: Path, observer: _NoteObserver, stop_requested: Callable[[], bool]
) -> dict[str, Any]:
    if (folder / SUMMARY_FILE).is_file():
        return json.loads((folder / SUMMARY_FILE).read_text())
    settings = pruned.settings.dense()
    checkpoint = folder / CHECKPOINT_FILE
    state = load_checkpoint(checkpoint) if checkpoint.is_file() else None
    _make_folder(folder)
    return _train(Trainer(settings, pruned.dataset, state), folder, observer("dense"), stop_requested, None)


def _train(
    trainer: Trainer,
    folder: Path,
    observer: Observer,
    stop_requested: Callable[[], bool],
    dense: dict[str, Any] | None,
) -> dict[str, Any]:
    trainer.train(observer, lambda: _save(trainer, folder), stop_requested)
    summary = _summary(trainer, dense)
    save_model(folder / MODEL_FILE, trainer.result, trainer.arguments, trainer.dataset.normalization)
    dense_history = read_history(folder / DENSE_FOLDER / HISTORY_FILE) if dense else []
    report.write_report(folder, summary, trainer.history, dense_history)
    write_json(folder / SUMMARY_FILE, summary)
    return summary


def _save(trainer: Trainer, folder: Path) -> None:
    save_atomically(folder / CHECKPOINT_FILE, trainer.state())
    write_json_lines(folder / HISTORY_FILE, trainer.history)


def read_history(path: Path) -> list[dict[str, Any]]:
    """The records of a `history.jsonl`."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _summary(trainer: Trainer, dense: dict[str, Any] | None) -> dict[str, Any]:
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
        **results(trainer),
    }
    for key in _DENSE_KEYS if dense else ():
        summary[f"dense_{key.removesuffix('_after')}"] = dense[key]  # type: ignore[index]
    summary["settings"] = {
        **settings.as_dict(),
        "lr": trainer.peak_lr,
        "weight_decay": settings.decay_in_use,
    }
    summary["versions"] = versions()
    return summary


def evaluate_saved(folder: Path, data: str | None, device: torch.device) -> tuple[float, float, int]:
    """Accuracy in percent, mean cross entropy, and number of the test images.

    Args:
        folder: of a finished run.
        data: "digits" or the path of an .npz file; None: the data of the run.
        device: where to compute.

    Raises:
        InputError: there is no such folder or network, or the images do not fit it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    network = load_network(folder, device)
    if data is None:
        summary = folder / SUMMARY_FILE
        if not summary.is_file():
            raise InputError(f"{folder}: has no {SUMMARY_FILE}; name the data with --data")
        data = str(json.loads(summary.read_text())["data"])
    x, y = _test_tensors(data, network, read_images(data))
    return *evaluate(network, x.to(device), y.to(device)), len(y)


def _test_tensors(data: str, network: nn.Module, images: Images) -> tuple[Tensor, Tensor]:
    """The test images as the network takes them, and their labels, once both are known to fit it."""
    channels, height, width = network.image_shape  # type: ignore[misc]
    x = network.normalization(images.x_test)  # type: ignore[operator]
    if tuple(x.shape[1:]) != (channels, height, width):
        shape = "x".join(str(side) for side in images.x_test.shape[1:])
        raise InputError(f"{data}: x_test has images of {shape}, the network takes {height}x{width}x{channels}")
    if images.y_test.max() >= network.classes:  # type: ignore[operator]
        raise InputError(f"{data}: y_test has label {images.y_test.max()}, the network knows {network.classes} classes")
    return x, torch.from_numpy(images.y_test)


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


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a flag, so that the step in hand is finished; a second SIGINT is abrupt."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    try:
        previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: signals are the caller's business
        yield lambda: False
        return
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
