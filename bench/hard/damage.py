"""Damaged files: one file of a finished or a stopped run, of its exports, its data or its study, and what reads it.

A case damages one file of a copy and calls one command. It is *silent* where the command says nothing and its result
is another one (for `check`, where it calls a changed file whole), *unclear* where the error is no line that names the
file, *crashed* where the process dies or hangs. What is accepted with the same result is fine: an unused file, a byte
of white space, or a file that was made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.hard.forks import forked
from bench.hard.small_runs import result, settings, without_report
from bench.hard.tally import Tally
from flatprune import runs
from flatprune.cli import main
from flatprune.data import read_images
from flatprune.export import EXPORT_FILES, EXPORTS_FILE, FORMATS, load

Command = Callable[[Path], str]  # the folder of a case -> what came of it
SIZES = {"quick": 150, "full": 2000}
STUDY = """
base: {data: digits, model: mlp, widths: [8, 6], epochs: 2, train_size: 120, batch_size: 40, target_params: 0.5}
grid: {seed: [1, 2]}
"""
_AT_THE_END = ("summary.json", "digests.json", "model.pt", "report.html", "progress.png")
_NEVER = ("lock", "lock.holder", "log.txt")


class Outcome(NamedTuple):
    """Of a command: its exit code (77 for an exception), what it said in the end, and what came of it."""

    code: int
    error: str
    value: str


def run(
    cases: int,
    seed: int,
    seconds: float,
    commands: Collection[Command] | None = None,
    exports: Collection[str] = tuple(FORMATS),
    first: int = 0,
) -> Tally:
    """Damage `cases` files, beginning with case `first`, which these commands read, beside these exports."""
    chosen = list(COMMANDS if commands is None else commands)
    tally = Tally("damage", seed, next=first)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for number, name in enumerate(("whole", "other")):
            _prepare(folder / name, number, chosen, exports)
        references: dict[str, Outcome] = {}
        for case in range(first, first + cases):
            if time.monotonic() - begin > seconds:
                break
            rng = random.Random(f"{seed} {case}")
            _case(tally, folder, rng, rng.choice(chosen), f"--seed {seed} --only {case}", references)
            tally.next = case + 1
    tally.seconds = time.monotonic() - begin
    return tally


def _prepare(place: Path, seed: int, commands: Collection[Command], exports: Collection[str]) -> None:
    """A folder of everything that is read; one of another seed is there to swap files with."""
    without_report()
    place.mkdir()
    _quiet(lambda: runs.run(settings(seed=seed, compare_dense=True), place / "run"))
    for to in exports:
        if to != "onnx" or importlib.util.find_spec("onnxscript"):
            assert _quiet(lambda to=to: main(["export", str(place / "run"), "--to", to])) == 0
    shutil.copytree(place / "run", place / "stopped")
    for name in _AT_THE_END:
        (place / "stopped" / name).unlink(missing_ok=True)
    rng = np.random.default_rng(seed)
    images = {f"x_{part}": rng.integers(0, 255, (40, 8, 8, 1), dtype=np.uint8) for part in ("train", "test")}
    labels = {f"y_{part}": rng.permutation(np.arange(40) % 4) for part in ("train", "test")}
    (np.savez if seed else np.savez_compressed)(place / "data.npz", **images, **labels)
    if any(COMMANDS[command] == "study" for command in commands):
        (place / "study.yaml").write_text(STUDY.replace("[1, 2]", f"[{2 * seed + 1}, {2 * seed + 2}]"))
        study = ["study", str(place / "study.yaml"), "--out", str(place / "study"), "--jobs", "1"]
        assert _quiet(lambda: main(study)) == 0


def _quiet(function: Callable[[], object]) -> object:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return function()


def _eval(place: Path) -> str:
    return _cli("eval", place / "run")


def _load(place: Path) -> str:
    return _digest(load(place / "run").state_dict().values())


def _load_safetensors(place: Path) -> str:
    return _digest(load(place / "run" / "model.safetensors").state_dict().values())


def _export(place: Path) -> str:
    _cli("export", place / "run", "--to", "safetensors", "--overwrite")
    return hashlib.sha256((place / "run" / "model.safetensors").read_bytes()).hexdigest()


def _resume(place: Path) -> str:
    _cli("run", "--resume", "--out", place / "run")
    return result(place / "run")


def _resume_stopped(place: Path) -> str:
    _cli("run", "--resume", "--out", place / "stopped")
    return result(place / "stopped")


def _data(place: Path) -> str:
    images = read_images(str(place / "data.npz"))
    return _digest([images.x_train, images.y_train, images.x_test, images.y_test])


def _report(place: Path) -> str:
    _cli("study", "--report-only", place / "study")
    return (place / "study" / "table.csv").read_text()


def _check(place: Path) -> str:
    return _cli("check", place / "run")


def _check_study(place: Path) -> str:
    return _cli("check", place / "study")


COMMANDS: dict[Command, str] = {
    _eval: "run",
    _load: "run",
    _load_safetensors: "run",
    _export: "run",
    _resume: "run",
    _check: "run",
    _resume_stopped: "stopped",
    _data: "data.npz",
    _report: "study",
    _check_study: "study",
}


def _digest(arrays) -> str:
    digest = hashlib.sha256()
    for array in map(np.asarray, arrays):
        digest.update(f"{array.shape} {array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()


class Refused(Exception):  # noqa: N818
    """A command ended with another exit code than 0."""


def _cli(*arguments: object) -> str:
    """What the command prints; Refused with its exit code and what it says on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(map(str, arguments)))
    if code:
        raise Refused(code, err.getvalue())
    return out.getvalue()


def _outcome(command: Command, place: Path) -> Outcome:
    try:
        return Outcome(0, "", command(place).replace(str(place), ""))
    except Refused as refused:
        return Outcome(*refused.args, "")
    except ValueError as error:
        return Outcome(2, f"{error}\n", "")
    except BaseException as error:
        return Outcome(77, repr(error), "")


def _case(
    tally: Tally, folder: Path, rng: random.Random, command: Command, name: str, references: dict[str, Outcome]
) -> None:
    whole, other, place = folder / "whole", folder / "other", folder / "case"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(whole, place)
    if command.__name__ not in references:
        references[command.__name__] = forked(lambda: _outcome(command, place)).value
        shutil.rmtree(place)
        shutil.copytree(whole, place)
    part = place / COMMANDS[command]
    files = [part] if part.is_file() else sorted(path for path in part.rglob("*") if path.is_file())
    path = rng.choice([path for path in files if path.name not in _NEVER and path.stat().st_size])
    how = rng.choice([name for name in DAMAGES if not _is_allowed(command, path, name)])
    before = path.read_bytes()
    DAMAGES[how](path, rng, other / path.relative_to(place))
    after = path.read_bytes() if path.exists() else None
    if before == after:
        return
    tally.tried += 1
    ended = forked(lambda: _outcome(command, place))
    where = f"{name}: {path.relative_to(place)} {how}, {command.__name__.strip('_')}"
    if ended.value is None:
        tally.fault("crashed", f"{where}: {'hung' if ended.hung else f'signal {ended.signal}'}")
    elif ended.value.code == 0:
        if _is_silent(command, ended.value, references[command.__name__], path, before, after):
            tally.fault("silent", where)
    elif not _is_clear(ended.value, path):
        tally.fault("unclear", f"{where}: exit {ended.value.code}: {ended.value.error[:300]}")


def _is_allowed(command: Command, path: Path, how: str) -> bool:
    """Whether what was done is no damage: other files are other files, and what nobody needs may be taken away."""
    if command in (_data, _load_safetensors):
        return how == "swap"
    return command is _check and how == "remove" and path.name in (*EXPORT_FILES, EXPORTS_FILE, "checkpoint.pt")


def _is_silent(command, found: Outcome, reference: Outcome, path: Path, before: bytes, after: bytes | None) -> bool:
    if command in (_check, _check_study):
        return not _says_the_same(path, before, after)
    return found.value != reference.value


def _says_the_same(path: Path, before: bytes, after: bytes | None) -> bool:
    """Whether the files are the same but for white space in JSON."""
    if after is None or path.suffix != ".json":
        return False
    with contextlib.suppress(ValueError):
        return json.loads(before) == json.loads(after)
    return False


def _is_clear(found: Outcome, path: Path) -> bool:
    lines = found.error.strip().splitlines()
    return found.code == 2 and bool(lines) and path.name in lines[-1] and len(lines[-1]) < 2500


def _flip(path: Path, rng: random.Random, other: Path) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _truncate(path: Path, rng: random.Random, other: Path) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def _zero(path: Path, rng: random.Random, other: Path) -> None:
    data = bytearray(path.read_bytes())
    length = rng.choice((1, 16, 512, 4096))
    start = rng.randrange(len(data))
    data[start : start + length] = bytes(min(length, len(data) - start))
    path.write_bytes(data)


def _empty(path: Path, rng: random.Random, other: Path) -> None:
    path.write_bytes(b"")


def _remove(path: Path, rng: random.Random, other: Path) -> None:
    path.unlink()


def _replace(path: Path, rng: random.Random, other: Path) -> None:
    texts = (b"hello\n", b"{}", b"null", b"[]", b"PK\x03\x04", b"\x80\x04N.", b"\xff" * 64, b"nan", b"{" * 9999)
    path.write_bytes(rng.choice((*texts, rng.randbytes(500))))


def _append(path: Path, rng: random.Random, other: Path) -> None:
    path.write_bytes(path.read_bytes() + rng.choice((b"x", b"\0" * 100, b"{}\n", path.read_bytes())))


def _shift(path: Path, rng: random.Random, other: Path) -> None:
    data = path.read_bytes()
    start = rng.randrange(len(data))
    path.write_bytes(data[:start] + rng.randbytes(rng.choice((1, 7))) + data[start:])


def _swap(path: Path, rng: random.Random, other: Path) -> None:
    """The file of the same name of another run, or another file of this one."""
    near = sorted(file for file in path.parent.iterdir() if file.is_file() and file != path)
    source = other if other.is_file() and rng.random() < 0.7 else rng.choice(near or [path])
    path.write_bytes(source.read_bytes())


DAMAGES: dict[str, Callable[[Path, random.Random, Path], None]] = {
    "flip": _flip,
    "truncate": _truncate,
    "zero": _zero,
    "empty": _empty,
    "remove": _remove,
    "replace": _replace,
    "append": _append,
    "shift": _shift,
    "swap": _swap,
}
