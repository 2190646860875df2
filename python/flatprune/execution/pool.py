"""Tasks that are being made: as many at once as wanted, stopped in good order."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from flatprune.errors import RunsFailedError
from flatprune.execution.executors import Executor, Job
from flatprune.execution.task import FAILED, LOG_FILE, STOP_FILE, Ended, Steps, Task, last_line, read_steps
from flatprune.files.records import write_record
from flatprune.runs.folder import SETTINGS, SETTINGS_FILE
from flatprune.settings import Settings

_GRACE_SECONDS = 120.0  # for a step to end and a checkpoint to be written
_STEPS_SECONDS = 0.5


@dataclass
class Running:
    """A run that was handed over.

    Attributes:
        key, name, settings, folder: which one.
        place: its number among those at once.
        steps: how far it is, as it told last.
        started: time (monotonic) of its first step that was heard of, or when it was handed over.
        asked_to_stop: whether it was.
    """

    key: str
    name: str
    settings: Settings
    folder: Path
    job: Job
    place: int
    steps: Steps | None = None
    started: float = field(default_factory=time.monotonic)
    asked_to_stop: bool = False

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.started


class Pool:
    """Runs that an executor makes.

    Args:
        executor: makes them.
        jobs: at once.
    """

    def __init__(self, executor: Executor, jobs: int) -> None:
        self.executor, self.jobs = executor, jobs
        self.running: list[Running] = []
        self._looked = 0.0

    @property
    def is_full(self) -> bool:
        """Whether there are as many as may be."""
        return len(self.running) >= self.jobs

    def start(self, key: str, name: str, settings: Settings, folder: Path, *, restart_damaged: bool = False) -> Running:
        """Have a run made in a folder, or gone on with.

        Raises:
            RunsFailedError: the executor does not take it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if settings.device == "cpu" and settings.threads is None:
            settings = settings.changed(threads=1)
        write_record(folder / SETTINGS_FILE, SETTINGS, settings.as_dict())
        (folder / STOP_FILE).unlink(missing_ok=True)
        (folder / LOG_FILE).write_text("")
        threads = (settings.threads or 1) if settings.device == "cpu" else None
        task = Task(str(folder.absolute()), str(Path.cwd()), settings.device, threads, restart_damaged)
        taken = {running.place for running in self.running}
        place = next(place for place in itertools.count() if place not in taken)
        try:
            job = self.executor.submit(task, place)
        except Exception as error:
            raise RunsFailedError(f"{name}: was not taken by the executor ({self.executor.reason(error)})") from error
        self.running.append(Running(key, name, settings, folder, job, place))
        return self.running[-1]

    def wait(self) -> Iterator[tuple[Running, Ended]]:
        """Wait a moment, and hear of those that ended."""
        time.sleep(self.executor.look_seconds)
        self._look()
        for running in [running for running in self.running if running.job.done()]:
            self.running.remove(running)
            yield running, self._end(running)

    def stop(self, running: Running) -> None:
        """Ask a run to save a checkpoint and to end."""
        running.asked_to_stop = True
        with contextlib.suppress(OSError):  # gone, or a full disk
            (running.folder / STOP_FILE).touch()

    def close(self) -> None:
        """Stop all runs, and let go of the executor.

        Those that have not begun are taken back; should one begin nevertheless, it finds that it is to stop. Those that
        do not end in time are killed where that can be.
        """
        begun = []
        for running in self.running:
            self.stop(running)
            if read_steps(running.folder) is None:
                running.job.cancel()
            else:
                begun.append(running)
        deadline = time.monotonic() + _GRACE_SECONDS
        late = False
        try:
            while (late := time.monotonic() > deadline) is False and not all(r.job.done() for r in self.running):
                time.sleep(self.executor.look_seconds)
        except KeyboardInterrupt:
            late = True
        self.executor.close(kill=late)
        for running in begun:
            (running.folder / STOP_FILE).unlink(missing_ok=True)
        self.running = []

    def _look(self) -> None:
        if time.monotonic() - self._looked < _STEPS_SECONDS:
            return
        self._looked = time.monotonic()
        for running in self.running:
            steps = read_steps(running.folder)
            if steps is not None and running.steps is None:
                running.started = time.monotonic() - steps.seconds
            running.steps = steps or running.steps

    def _end(self, running: Running) -> Ended:
        try:
            return running.job.result()
        except Exception as error:
            reason = self.executor.reason(error)
            said = last_line(running.folder)
            return Ended(FAILED, f"{said} ({reason})" if said else reason)
        finally:
            (running.folder / STOP_FILE).unlink(missing_ok=True)
