"""Runs of a study, one after the other, in a process of their own: `python -m flatprune.study.worker`.

Takes folders from its standard input, a line of JSON each (`[FOLDER, RESTART_DAMAGED]`). Does what `flatprune run`
does with the settings in FOLDER/settings.json, or goes on from the checkpoint that is there; errors go to
FOLDER/log.txt. Prints "STEP TOTAL" now and then, "ended CODE" after each run that another may follow. A run ends
early, with a checkpoint, and the process with it, on SIGTERM, and when the standard input closes: that is how it
learns that the study has ended, even by a kill.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from flatprune import runs
from flatprune.errors import DivergedError, InputError, Interrupted
from flatprune.run_folder import CHECKPOINT_FILE, read_settings
from flatprune.settings import Settings
from flatprune.study.process import LOG_FILE
from flatprune.training.trainer import Observer

if TYPE_CHECKING:
    from flatprune.training.trainer import Trainer

EXIT_INPUT, EXIT_DIVERGED, EXIT_FILE, EXIT_INTERRUPTED = 2, 3, 4, 130
_REPORT_SECONDS = 0.5


class Steps(Observer):
    """Prints how many steps are done."""

    def __init__(self) -> None:
        self._last = 0.0

    def start(self, trainer: Trainer) -> None:
        """Tell where the run begins."""
        self._print(trainer)

    def step(self, trainer: Trainer) -> None:
        """Tell it again, twice a second at most."""
        if time.monotonic() - self._last > _REPORT_SECONDS:
            self._print(trainer)

    def _print(self, trainer: Trainer) -> None:
        self._last = time.monotonic()
        _tell(trainer.progress.step, trainer.total_steps)


def main() -> int:
    """Make runs until the standard input closes or one does not end well; the exit code is the last one's."""
    orders: queue.SimpleQueue[tuple[Path, bool] | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(orders,), daemon=True).start()
    code = 0
    while code == 0 and (order := orders.get()) is not None:
        folder, restart_damaged = order
        with open(folder / LOG_FILE, "w") as log:
            os.dup2(log.fileno(), sys.stderr.fileno())
        code = _make(folder, restart_damaged)
        if code == 0:
            _forget()
            _tell("ended", code)
    return code


def _forget() -> None:
    """Let go of what a run held, so that the next one has the memory (and the compiler's patience) of a first one."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _make(folder: Path, restart_damaged: bool) -> int:
    """Make the run in `folder`; the exit code tells what became of it, the last line on stderr why."""
    try:
        _run(folder, restart_damaged)
        return 0
    except Interrupted as error:
        return _fail(error, EXIT_INTERRUPTED)
    except DivergedError as error:
        return _fail(error, EXIT_DIVERGED)
    except InputError as error:
        return _fail(error, EXIT_INPUT)
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else error, EXIT_FILE)


def _run(folder: Path, restart_damaged: bool) -> None:
    settings = Settings.from_dict(read_settings(folder))
    warnings.simplefilter("ignore")  # the study has checked these settings and shown what they warn of
    if (folder / CHECKPOINT_FILE).is_file():
        given = {name: getattr(settings, name) for name in ("data", "model", "device")}
        runs.resume(folder, given, restart_damaged=restart_damaged, wait=True, observer=lambda _: Steps())
    else:  # waits, as the worker of a killed study may still be saving
        runs.run(settings, folder, overwrite=True, wait=True, observer=lambda _: Steps())


def _read(orders: queue.SimpleQueue[tuple[Path, bool] | None]) -> None:
    for line in sys.stdin:
        folder, restart_damaged = json.loads(line)
        orders.put((Path(folder), restart_damaged))
    orders.put(None)
    os.kill(os.getpid(), signal.SIGTERM)


def _tell(*words: object) -> None:
    try:
        print(*words, flush=True)
    except BrokenPipeError:  # the study has ended; the end of the standard input stops this run in good order
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _fail(message: object, code: int) -> int:
    print(" ".join(str(message).split()), file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
