"""Makes runs, each in a process of its own on one thread, until all are there or the time is up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.machine import ROOT
from bench.rivals.method import Method
from bench.rivals.one_run import OTHER_CODE, shape_run
from bench.rivals.plan import Folder, Run, runs_of
from flatprune.errors import InputError

_POLL = 0.2


@dataclass
class Study:
    """What is to be run.

    Attributes:
        tasks, targets: names.
        methods: those that are installed.
        seeds: of the tables.
        tuning_seeds: of the choice of knobs; empty: nothing is tuned.
    """

    tasks: Sequence[str]
    targets: Sequence[str]
    methods: dict[str, type[Method]]
    seeds: Sequence[int]
    tuning_seeds: Sequence[int]

    def left(self, folder: Folder) -> Iterator[Run]:
        """Runs without an outcome: recommended settings first, then those that choose a knob, then the chosen ones."""
        seen: set[Run] = set()
        for run in self._all(folder):
            if run not in seen and folder.outcome(run) is None:
                seen.add(run)
                yield run

    def _all(self, folder: Folder) -> Iterator[Run]:
        places = [
            (task, target, *item) for task in self.tasks for target in self.targets for item in self.methods.items()
        ]
        for seed in self.seeds:
            for task, target, name, method in places:
                yield from runs_of(task, target, name, method, method.knob.recommended, [seed], tuning=False)
        if not self.tuning_seeds:
            return
        for task, target, name, method in places:
            for value in method.knob.values:
                yield from runs_of(task, target, name, method, value, self.tuning_seeds, tuning=True)
        for task, target, name, method in places:
            value = folder.best_value(task, target, name, method, self.tuning_seeds)
            if value is not None:
                yield from runs_of(task, target, name, method, value, self.seeds, tuning=False)


def go_on(study: Study, folder: Folder, data_dir: Path, minutes: float | None, jobs: int) -> int:
    """Make what is left, for so many minutes; a run that has begun is always finished.

    Returns:
        How many runs are still left.

    Raises:
        InputError: the code has changed meanwhile.
    """
    end = None if minutes is None else time.monotonic() + 60 * minutes
    running: dict[Run, subprocess.Popen[bytes]] = {}
    ready = _ready(study, folder)
    while running or ready:
        while ready and len(running) < jobs and (end is None or time.monotonic() < end):
            run = ready.pop(0)
            running[run] = _start(run, folder, data_dir)
        if not running:
            break
        time.sleep(_POLL)
        ended = [run for run, process in running.items() if process.poll() is not None]
        for run in ended:
            _close(run, folder, running.pop(run).returncode)
        if ended:  # others may begin now
            ready = [run for run in _ready(study, folder) if run not in running]
    return sum(1 for _ in study.left(folder))


def _ready(study: Study, folder: Folder) -> list[Run]:
    return [run for run in study.left(folder) if _may_begin(run, folder)]


def _may_begin(run: Run, folder: Folder) -> bool:
    needed = shape_run(run)
    other = None if needed is None else folder.outcome(needed)
    if needed is not None and other is not None and other["status"] != "ended":  # there is no shape to train
        folder.keep(run, {"status": "failed", "reason": f"{needed.key} {other['status']}"})
        return False
    return needed is None or other is not None


def _start(run: Run, folder: Folder, data_dir: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    paths = [str(ROOT), str(ROOT / "python"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-m", "bench.rivals.one_run", folder.path, data_dir, json.dumps(asdict(run))]
    with open(_log(run, folder), "wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def _close(run: Run, folder: Folder, code: int) -> None:
    if code == OTHER_CODE:
        raise InputError(f"{folder.path}: the code has changed since the first run; use another folder")
    if code in (-signal.SIGINT, -signal.SIGTERM):  # somebody ends the study
        raise KeyboardInterrupt
    if folder.outcome(run) is None:  # killed, say for its memory
        folder.keep(run, {"status": "failed", "reason": f"ended with exit code {code}"})
    found = folder.outcome(run) or {}
    if found["status"] != "failed":
        _log(run, folder).unlink(missing_ok=True)
    shown = f"{found['accuracy']:.2f} %" if "accuracy" in found else f"{found['status']}: {found['reason']}"
    print(f"{run.key}: {shown}", flush=True)


def _log(run: Run, folder: Folder) -> Path:
    return folder.path / f"{run.key}.log"
