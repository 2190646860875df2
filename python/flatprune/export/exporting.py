"""Write a pruned network in a format that others read, once the written file is known to compute the same."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flatprune.errors import ExportError, InputError
from flatprune.export import onnx_file, plain_source, program_file, safetensors_file
from flatprune.export.loading import read_saved
from flatprune.export.model_file import MODEL_FILE
from flatprune.export.saved import SavedNetwork
from flatprune.export.subject import NORMALIZED, Subject
from flatprune.files.atomic import sha256, sync
from flatprune.files.lock import locked
from flatprune.files.records import Kind, read_record, write_record

EXPORTS_FILE = "exports.json"
EXPORTS = Kind("flatprune-exports", 1)
BATCHES = (1, 5)  # images on which outputs are compared; the exporters see 2
TOLERANCE = 1e-4  # of the largest output: rounding through a hundred layers, in another order of sums


class Format(NamedTuple):
    """How to write a kind of file, and how to run it.

    Attributes:
        file: its name in the folder of the run, unless another is given.
        write: writes a subject to a path; returns the files it made, the one at the path last.
        reopen: the function that the file at a path computes.
        check: raises DamagedError where the file at a path is not what was written; runs nothing of it.
    """

    file: str
    write: Callable[[Subject, Path], list[Path]]
    reopen: Callable[[Path], Callable[[Tensor], Tensor]]
    check: Callable[[Path], None]


FORMATS = {
    "onnx": Format("model.onnx", onnx_file.write, onnx_file.reopen, onnx_file.check),
    "torch-export": Format("model.pt2", program_file.write, program_file.reopen, program_file.check),
    "safetensors": Format("model.safetensors", safetensors_file.write, safetensors_file.reopen, safetensors_file.check),
    "torch": Format("network.py", plain_source.write, plain_source.reopen, plain_source.check),
}
EXPORT_FILES = (*(kind.file for kind in FORMATS.values()), plain_source.weights_path(Path(FORMATS["torch"].file)).name)


def check_export(path: Path) -> None:
    """Raise DamagedError where a file of `EXPORT_FILES` is not what was written; runs nothing of it."""
    checks = {kind.file: kind.check for kind in FORMATS.values()}
    checks.get(path.name, plain_source.check)(path)


def read_exports(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 of the exports that were written into the folder of a run; InputError where unreadable."""
    if not (folder / EXPORTS_FILE).exists():
        return {}
    return dict(read_record(folder / EXPORTS_FILE, EXPORTS)["files"])


def _note_exports(folder: Path, digests: dict[str, str | None]) -> None:
    """Note what the exports in the folder of a run are, or (None) that they are about to change."""
    if not (folder / MODEL_FILE).is_file():
        return
    try:
        known = read_exports(folder)
    except InputError:
        known = {}
    noted = {name: digest for name, digest in {**known, **digests}.items() if digest is not None}
    write_record(folder / EXPORTS_FILE, EXPORTS, {"files": noted})


class Export(NamedTuple):
    """What was written.

    Attributes:
        files: of the export, the one to open last.
        size: of all of them, bytes.
        params: trainable scalars of the network.
        images: what it takes, in words.
        difference: largest absolute difference of its outputs from those of the network.
        largest: largest absolute output of the network on the same images.
    """

    files: list[Path]
    size: int
    params: int
    images: str
    difference: float
    largest: float


def export_run(
    folder: str | os.PathLike[str],
    to: str,
    *,
    out: str | os.PathLike[str] | None = None,
    input: str = NORMALIZED,
    overwrite: bool = False,
) -> Export:
    """Write the network of a finished run in another format.

    The file is written under another name, opened again and run on 1 and 5 random images; it gets its own name when the
    largest difference from the network's outputs is at most 1e-4 of the largest output.

    Args:
        folder: of the run.
        to: "onnx", "torch-export", "safetensors" or "torch" (Python source and weights).
        out: the file; default model.onnx, model.pt2, model.safetensors or network.py in `folder`.
        input: what the exported network takes, see `flatprune.export.subject.Subject`.
        overwrite: replace an export that is there.

    Raises:
        InputError: something given cannot be used, a package is missing, or the folder is in use.
        ExportError: the network cannot be written in this format, or what was written computes something else.
        OSError: a file could not be written.
        In all cases nothing has been written, and what was there before is kept.

    Example:
        >>> export_run("runs/demo", "onnx", input="uint8").files
        [PosixPath('runs/demo/model.onnx')]
    """
    if to not in FORMATS:
        raise InputError(f"to is {to!r}, expected one of {', '.join(FORMATS)}")
    kind = FORMATS[to]
    path = Path(folder) / kind.file if out is None else Path(out)
    subject = Subject(_read_run(Path(folder)), input)
    _check_free(path, to, overwrite)
    own = path.parent.resolve() == Path(folder).resolve()  # elsewhere the run's folder may be read-only
    with locked(path.parent) if own else contextlib.nullcontext(), _staging_folder(path) as staging:
        with _failures_named(to):
            staged = kind.write(subject, staging / path.name)
            difference, largest = _compare(subject, kind.reopen(staged[-1]))
        size = sum(file.stat().st_size for file in staged)
        digests = {file.name: sha256(file.read_bytes()) for file in staged}
        _note_exports(path.parent, dict.fromkeys(digests))
        files = _publish(staged, path.parent)
        _note_exports(path.parent, dict(digests))
    return Export(files, size, subject.params, subject.input_text(), difference, largest)


def _read_run(folder: Path) -> SavedNetwork:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if not (folder / MODEL_FILE).is_file():
        raise InputError(f"{folder}: holds no finished run (there is no {MODEL_FILE})")
    return read_saved(folder)


def _check_free(path: Path, to: str, overwrite: bool) -> None:
    suffix = Path(FORMATS[to].file).suffix
    if path.suffix != suffix:
        raise InputError(f"{path}: expected a name that ends in {suffix} for {to}")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}")
    for file in (path, plain_source.weights_path(path)) if to == "torch" else (path,):
        if file.is_dir():
            raise InputError(f"{file}: is a folder, expected the name of a file")
        if file.exists() and not overwrite:
            raise InputError(f"{file}: exists already; say --overwrite to replace it")


@contextlib.contextmanager
def _staging_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` until the end; one fixed name, so that a killed process leaves at most one behind."""
    staging = path.with_name(path.name + ".tmp")
    try:
        if staging.is_dir():
            shutil.rmtree(staging)
        staging.mkdir()
        yield staging
    except OSError as error:
        raise OSError(error.errno, f"cannot be saved ({error.strerror or error})", str(path)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def _failures_named(to: str) -> Iterator[None]:
    try:
        yield
    except (InputError, OSError):
        raise
    except ExportError as error:
        raise ExportError(f"to {to}: {error}") from error
    except Exception as error:  # exporters raise whatever their passes raise
        raise ExportError(f"to {to}: {type(error).__name__}: {error}") from error


@torch.no_grad()
def _compare(subject: Subject, written: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Largest difference of outputs and largest output of the network; ExportError where the first is not rounding."""
    pairs = []
    for n in BATCHES:
        images = subject.images(n)
        expected, found = subject.network(images), written(images)
        if found.shape != expected.shape:
            shapes = f"{tuple(found.shape)}, not {tuple(expected.shape)}"
            raise ExportError(f"outputs for {n} images are of shape {shapes}")
        pairs.append((expected, found))
    expected, found = (torch.cat(outputs) for outputs in zip(*pairs))
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())  # NaN where one is
    if not difference <= TOLERANCE * largest:
        raise ExportError(f"outputs differ by {difference:.2g} from the network's, which are up to {largest:.2g}")
    return difference, largest


def _publish(staged: list[Path], folder: Path) -> list[Path]:
    """Move files to `folder`; the last one, which is opened first, is there only while all others are."""
    for file in staged:
        sync(file)
    files = [folder / file.name for file in staged]
    if len(files) > 1:
        files[-1].unlink(missing_ok=True)
    for file, target in zip(staged, files):
        os.replace(file, target)
    sync(folder)
    return files
