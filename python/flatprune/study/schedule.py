"""Makes the runs of a study: several at once, each place with a process, stopped and continued without loss."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from flatprune.errors import InputError, Interrupted
from flatprune.files.atomic import sha256, write_atomically
from flatprune.files.finished import read_summary
from flatprune.files.lock import locked
from flatprune.files.records import write_record
from flatprune.run_folder import CHECKPOINT_FILE, SETTINGS, SETTINGS_FILE, check_free
from flatprune.settings import Settings
from flatprune.signals import stop_signals
from flatprune.study.check import check_study
from flatprune.study.display import Display, Standing, display_for
from flatprune.study.grid import Study
from flatprune.study.plan import DAMAGED, DATA, DATA_FILE, DIVERGED, FAILED, Outcome, Plan, data_id
from flatprune.study.process import LOG_FILE, Worker
from flatprune.study.report import STUDY_FILE
from flatprune.study.worker import EXIT_DIVERGED, EXIT_FILE

_POLL_SECONDS = 0.05
_GRACE_SECONDS = 120.0  # for a step to end and a checkpoint to be written
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass
class Child:
    """A run that is being made.

    Attributes:
        key, name, settings: which one.
        worker: makes it.
        slot: its place among those that run at once, which decides the GPU.
    """

    key: str
    name: str
    settings: Settings
    worker: Worker
    slot: int
    started: float = field(default_factory=time.monotonic)


def run_study(
    study: Study,
    folder: Path,
    *,
    jobs: int | None = None,
    minutes: float | None = None,
    restart_damaged: bool = False,
    console: Console | None = None,
) -> tuple[Plan, dict[str, str]]:
    """Make all runs of a study that are not there.

    Args:
        study: what to do.
        folder: of the study, made if it is not there.
        jobs: runs at once; default as many as there are GPUs (runs on "cuda") or cores.
        minutes: stop after so many, as if interrupted; default never.
        restart_damaged: make runs anew whose checkpoint or summary is damaged, which is put aside.
        console: where the progress is shown.

    Returns:
        The plan with all outcomes, and name -> reason of the runs that failed (those that diverged are not among them).

    Raises:
        InputError: an entry cannot be used, or another study is going on in the folder; no run has been started.
        Interrupted: SIGINT, SIGTERM or the end of the time; all runs have saved checkpoints, the same call goes on.
        OSError: a run could not write its files; the others have been stopped with checkpoints.
    """
    console = console or Console()
    if jobs is not None and jobs < 1:
        raise InputError(f"jobs is {jobs}, expected 1 or more")
    if minutes is not None and not minutes > 0:
        raise InputError(f"minutes is {minutes:g}, expected a number above 0")
    deadline = math.inf if minutes is None else time.monotonic() + 60.0 * minutes
    data_ids = {data: data_id(data) for data in dict.fromkeys(settings.data for _, settings in study.runs())}
    steps = check_study(study, lambda text: console.print(f"warning: {text}", markup=False, soft_wrap=True))
    check_free(folder, overwrite=True)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        write_atomically(folder / STUDY_FILE, study.text)
        data_dir = None if study.data_dir is None else str(study.data_dir)
        write_record(folder / DATA_FILE, DATA, {"data_dir": data_dir, "digests": data_ids, "study": sha256(study.text)})
        plan = Plan(study, folder, data_ids, restart_damaged=restart_damaged)
        with stop_signals() as stop_requested:
            executor = _Executor(plan, steps, jobs or _default_jobs(study), display_for(console, study.title))
            executor.run(lambda: stop_requested() or time.monotonic() > deadline)
    return plan, plan.failures(FAILED, DAMAGED)


def _default_jobs(study: Study) -> int:
    if any(settings.device.startswith("cuda") for _, settings in study.runs()):
        return max(1, torch.cuda.device_count())
    return len(os.sched_getaffinity(0))


class _Executor:
    """Keeps `jobs` workers busy until nothing is left to do."""

    def __init__(self, plan: Plan, steps: dict[Settings, int], jobs: int, display: Display) -> None:
        self.plan, self.steps, self.jobs, self.display = plan, steps, jobs, display
        self.children: list[Child] = []
        self._idle: dict[int, Worker] = {}  # by slot
        self._pace = Pace()
        self._waiting: list[tuple[str, str, Settings]] = []
        self._look_again()

    def _look_again(self) -> None:
        """What is left to do, after a run has ended."""
        self._waiting = list(self.plan.wanted())
        self._counts = self.plan.counts()
        self._unmade = [(settings, self.steps.get(_of_the_grid(settings), 0)) for settings in self.plan.unmade()]

    def run(self, stop_requested: Callable[[], bool]) -> None:
        """Make the runs."""
        self.display.start(self._standing())
        try:
            while not stop_requested():
                self._start_more()
                if not self.children:
                    return
                time.sleep(_POLL_SECONDS)
                for child in [child for child in self.children if child.worker.code is not None]:
                    self.children.remove(child)
                    self._end(child)
                self.display.show(self._standing())
        finally:
            self._stop_children()
            self.display.stop(self._standing())
        done, total = self._counts
        raise Interrupted(f"stopped with {done} of {total} runs done; the same command goes on in {self.plan.folder}")

    def _start_more(self) -> None:
        running = {child.key for child in self.children}
        for key, name, settings in self._waiting:
            if len(self.children) >= self.jobs:
                break
            if key not in running:
                self.children.append(self._start(key, name, settings))
                running.add(key)

    def _start(self, key: str, name: str, settings: Settings) -> Child:
        folder = self.plan.folder_of(key)
        folder.mkdir(parents=True, exist_ok=True)
        taken = {child.slot for child in self.children}
        slot = next(slot for slot in itertools.count() if slot not in taken)
        if settings.device == "cpu" and settings.threads is None:
            settings = settings.changed(threads=1)
        write_record(folder / SETTINGS_FILE, SETTINGS, settings.as_dict())
        return Child(key, name, settings, self._worker(_environment(settings, slot), slot, folder), slot)

    def _worker(self, environment: dict[str, str], slot: int, folder: Path) -> Worker:
        """One at work on the run in `folder`: that which made the last run in this slot, if it can."""
        worker = self._idle.pop(slot, None)
        if worker is not None and worker.can_make(environment):
            worker.make(folder)
            return worker
        if worker is not None:
            worker.close()
        return Worker(environment, folder, restart_damaged=self.plan.restart_damaged)

    def _end(self, child: Child) -> None:
        """Note what became of a run whose process has ended."""
        folder, code = self.plan.folder_of(child.key), child.worker.code
        assert code is not None
        if code == 0:
            self._idle[child.slot] = child.worker
            outcome = Outcome(read_summary(folder))
        else:
            child.worker.close()
            message = _last_line(folder / LOG_FILE) or (f"ended by signal {-code}" if code < 0 else "no message")
            if code == EXIT_FILE:
                raise OSError(f"{child.name}: {message}; the study is stopped, the same command goes on")
            outcome = Outcome(None, DIVERGED if code == EXIT_DIVERGED else FAILED, f"{message} (exit code {code})")
        self._pace.ended(child)
        self.plan.record(child.key, outcome)
        if outcome.summary is not None:
            (folder / CHECKPOINT_FILE).unlink(missing_ok=True)  # all it was for is done
        self._look_again()
        self.display.ended(child.name, outcome, time.monotonic() - child.started, self._standing())

    def _stop_children(self) -> None:
        for child in self.children:
            child.worker.stop()
        deadline = time.monotonic() + _GRACE_SECONDS
        late = False
        try:
            for child in self.children:
                child.worker.wait(max(0.0, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            late = True
        for worker in [*(child.worker for child in self.children), *self._idle.values()]:
            worker.close(kill=late)
        self.children = []

    def _standing(self) -> Standing:
        running = [(child.name, child.worker.step, child.worker.total) for child in self.children]
        return Standing(*self._counts, running, self._pace.left(self._unmade, self.children, self.jobs))


class Pace:
    """Time left, from the seconds a step took in runs of the same kind, or in all where there was none yet."""

    def __init__(self) -> None:
        self._seconds: dict[Any, tuple[float, int]] = {}

    def ended(self, child: Child) -> None:
        """Learn from a run that has ended."""
        seconds, steps = self._seconds.get(_kind(child.settings), (0.0, 0))
        made = child.worker.steps_made
        self._seconds[_kind(child.settings)] = (seconds + time.monotonic() - child.started, steps + made)

    def left(self, steps: list[tuple[Settings, int]], running: list[Child], jobs: int) -> float | None:
        """Seconds until all of these runs are made; None as long as no step has been timed."""
        known = dict(self._seconds)
        for child in running:
            seconds, made = known.get(_kind(child.settings), (0.0, 0))
            elapsed = time.monotonic() - child.started
            known[_kind(child.settings)] = (
                seconds + elapsed,
                made + child.worker.steps_made,
            )
        seconds, made = (sum(column) for column in zip(*known.values())) if known else (0.0, 0)
        if made == 0:
            return None
        total = 0.0
        for settings, count in steps:
            own_seconds, own_made = known.get(_kind(settings), (0.0, 0))
            total += count * (own_seconds / own_made if own_made else seconds / made)
        for child in running:
            own_seconds, own_made = known[_kind(child.settings)]
            total -= child.worker.step * (own_seconds / own_made if own_made else seconds / made)
        return max(0.0, total / jobs)


def _kind(settings: Settings) -> Any:
    return settings.data, settings.model, settings.widths, settings.image_size, settings.batch_size, settings.flatness


def _of_the_grid(settings: Settings) -> Settings:
    return settings.changed(architecture_of=None)


def _environment(settings: Settings, slot: int) -> dict[str, str]:
    environment = dict(os.environ)
    if settings.device == "cpu":
        environment |= dict.fromkeys(_THREADS, str(settings.threads or 1))
    elif settings.device == "cuda":  # a GPU for each place; "cuda:1" means that one for all
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    return environment


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""
