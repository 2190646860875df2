"""One run as a task for another process: what it is told, what it answers, and the files it talks through meanwhile.

`make` does what `flatprune run` does with the settings in FOLDER/settings.json, or goes on from the checkpoint that is
there. What is written to stderr goes to FOLDER/log.txt. FOLDER/steps says how far the run is; where somebody puts
FOLDER/stop, it saves a checkpoint and ends. All of that needs no more than a folder that both sides see.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from flatprune import runs
from flatprune.errors import DivergedError, InputError, Interrupted
from flatprune.runs.folder import CHECKPOINT_FILE, read_settings
from flatprune.settings import Settings
from flatprune.training.ranks import alone
from flatprune.training.trainer import Observer

if TYPE_CHECKING:
    from flatprune.training.trainer import Trainer

LOG_FILE, STEPS_FILE, STOP_FILE = "log.txt", "steps", "stop"
FINISHED, DIVERGED, FAILED, NOT_WRITTEN, STOPPED = "", "diverged", "failed", "not written", "stopped"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Task:
    """A run to be made.

    Attributes:
        folder: of the run, from the root.
        home: folder that relative paths in its settings are taken from.
        device: of its settings.
        threads: of its process on a CPU, None on a GPU.
        restart_damaged: make it anew where its checkpoint or summary is damaged, which is put aside.
    """

    folder: str
    home: str
    device: str = "cpu"
    threads: int | None = None
    restart_damaged: bool = False

    @property
    def environment(self) -> dict[str, str]:
        """Variables that its process is to be started with, since libraries read them when they are loaded."""
        return {} if self.threads is None else dict.fromkeys(THREADS, str(self.threads))


class Ended(NamedTuple):
    """What became of a task: FINISHED, DIVERGED, FAILED, NOT_WRITTEN (a file) or STOPPED, and why."""

    kind: str
    message: str = ""


class Steps(NamedTuple):
    """How far a run is: the step it began at in this process, that it is at, all there are, and seconds since then."""

    first: int = 0
    step: int = 0
    total: int = 0
    seconds: float = 0.0


def read_steps(folder: Path) -> Steps | None:
    """What a run that is being made tells; None before its first step and after its last."""
    try:
        first, step, total, seconds = (folder / STEPS_FILE).read_text().split()
        return Steps(int(first), int(step), int(total), float(seconds))
    except (OSError, ValueError):  # half a line, as it is being written
        return None


def last_line(folder: Path) -> str:
    """The last line that a run wrote to stderr."""
    try:
        lines = (folder / LOG_FILE).read_text(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


class _Talk(Observer):
    """Tells how many steps are done, and heeds the wish to stop, twice a second at most."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._looked = 0.0

    def start(self, trainer: Trainer) -> None:
        """Training begins or goes on."""
        self._began, self._first = time.monotonic(), trainer.progress.step
        self._look(trainer)

    def step(self, trainer: Trainer) -> None:
        """An optimizer step is done."""
        if time.monotonic() - self._looked > _LOOK_SECONDS:
            self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        self._looked = time.monotonic()
        told = Steps(self._first, trainer.progress.step, trainer.total_steps, self._looked - self._began)
        with contextlib.suppress(OSError):  # nobody has to know
            (self._folder / STEPS_FILE).write_text(" ".join(map(str, told)))
        if (self._folder / STOP_FILE).exists():
            signal.raise_signal(signal.SIGTERM)  # which the run answers as it does when it comes from outside


def make(task: Task) -> Ended:
    """Make a run in the main thread of this process."""
    folder = Path(task.folder)
    if (folder / STOP_FILE).exists():
        return Ended(STOPPED)
    try:
        with _at(task.home), _stderr_in(folder / LOG_FILE), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # who ordered it has checked these settings and shown what they warn of
            return _ended(folder, task.restart_damaged)
    except OSError as error:  # of the folders themselves
        return Ended(NOT_WRITTEN, _line(error))
    finally:
        with contextlib.suppress(OSError):
            (folder / STEPS_FILE).unlink(missing_ok=True)
        _forget()


def make_apart(task: Task) -> Ended:
    """Make a run in a process of its own, which ends, with a checkpoint, when this one does.

    On a cluster: the libraries of the run are loaded with its own environment, it has a main thread and its random
    numbers for itself, and if it is killed then alone.
    """
    command = [sys.executable, "-m", "flatprune.execution.task", json.dumps(asdict(task))]
    environment = {**alone(dict(os.environ)), **task.environment}
    try:
        done = subprocess.run(
            command, env=environment, cwd=task.home, start_new_session=True, capture_output=True, text=True
        )
    except OSError as error:
        return Ended(FAILED, _line(error))
    if done.returncode == 0:
        return Ended(*json.loads(done.stdout.splitlines()[-1]))
    how = f"ended by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    said = last_line(Path(task.folder)) or " ".join(done.stderr.split("\n")[-2:]).strip()
    return Ended(FAILED, f"{said} ({how})" if said else how)


def detach() -> None:
    """Have this process hear no Ctrl-C, end as by SIGTERM once that which started it is gone, and be no rank."""
    with contextlib.suppress(PermissionError):  # it leads a session already
        os.setsid()
    for name in os.environ.keys() - alone(dict(os.environ)).keys():
        del os.environ[name]
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # Slurm's to the process that waits for this one
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent: int) -> None:
    while True:
        time.sleep(_LOOK_SECONDS)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)  # again and again, as a run in hand hears it once and goes on to save


def _ended(folder: Path, restart_damaged: bool) -> Ended:
    try:
        _run(folder, restart_damaged)
        return Ended(FINISHED)
    except Interrupted as error:
        return Ended(STOPPED, _line(error))
    except DivergedError as error:
        return Ended(DIVERGED, _line(error))
    except InputError as error:
        return Ended(FAILED, _line(error))
    except OSError as error:
        return Ended(NOT_WRITTEN, _line(error))
    except Exception as error:
        traceback.print_exc()
        return Ended(FAILED, _line(f"{type(error).__name__}: {error}"))


def _run(folder: Path, restart_damaged: bool) -> None:
    if runs.is_finished(folder):  # by the process of a scheduler that was killed
        return
    settings = Settings.from_dict(read_settings(folder))
    if (folder / CHECKPOINT_FILE).is_file():
        given = {name: getattr(settings, name) for name in ("data", "model", "device")}
        runs.resume(folder, given, restart_damaged=restart_damaged, wait=True, observer=lambda _: _Talk(folder))
    else:  # waits, as such a process may still be saving
        runs.run(settings, folder, overwrite=True, wait=True, observer=lambda _: _Talk(folder))


@contextlib.contextmanager
def _at(folder: str) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _stderr_in(path: Path) -> Iterator[None]:
    """What this process and its libraries write to stderr goes to a file."""
    kept = os.dup(2)
    try:
        with open(path, "w") as log:
            os.dup2(log.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


def _forget() -> None:
    """Let go of what a run held, so that the next one has the memory (and the compiler's patience) of a first one."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _line(error: object) -> str:
    if isinstance(error, OSError) and error.filename:
        error = f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


if __name__ == "__main__":
    detach()
    print(json.dumps(make(Task(**json.loads(sys.argv[1])))))
