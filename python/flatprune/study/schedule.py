"""Makes the runs of a study, in the order that they depend on each other, stopped and continued without loss."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from flatprune.errors import InputError, Interrupted
from flatprune.execution import DIVERGED, FAILED, Ended, Pool, Running, executor_options, make_executor
from flatprune.execution.task import FINISHED, NOT_WRITTEN
from flatprune.files.atomic import sha256, write_atomically
from flatprune.files.finished import SUMMARY_FILE, read_summary
from flatprune.files.lock import locked
from flatprune.files.records import write_record
from flatprune.runs.folder import CHECKPOINT_FILE, check_free
from flatprune.settings import Settings
from flatprune.signals import stop_signals
from flatprune.study.check import check_runs
from flatprune.study.display import Display, Standing, display_for
from flatprune.study.grid import Study
from flatprune.study.pace import Pace
from flatprune.study.plan import DAMAGED, DATA, DATA_FILE, Outcome, Plan, data_id
from flatprune.study.report import STUDY_FILE

SHARDS_FOLDER = "shards"
_SEEN_SECONDS = 60.0  # until a file of another machine is seen here


def run_study(
    study: Study,
    folder: Path,
    *,
    jobs: int | None = None,
    minutes: float | None = None,
    restart_damaged: bool = False,
    executor: str = "local",
    options: Mapping[str, Any] | None = None,
    shard: tuple[int, int] = (1, 1),
    console: Console | None = None,
) -> tuple[Plan, dict[str, str]]:
    """Make all runs of a study that are not there.

    Args:
        study: what to do.
        folder: of the study, made if it is not there.
        jobs: runs at once; default as many as there are GPUs (runs on "cuda") or cores, on a cluster all there are.
        minutes: stop after so many, as if interrupted; default never.
        restart_damaged: make runs anew whose checkpoint or summary is damaged, which is put aside.
        executor: who makes them, of `flatprune.execution.EXECUTORS`.
        options: of the executor; they win over those in the study.
        shard: (i, n): only the i-th of n parts, each of which may be made by another process at the same time.
        console: where the progress is shown.

    Returns:
        The plan with all outcomes, and name -> reason of the runs that failed (those that diverged are not among them).

    Raises:
        InputError: an entry cannot be used, or another study is going on in the folder; no run has been started.
        MissingPackageError: the executor's package is not installed.
        Interrupted: SIGINT, SIGTERM or the end of the time; all runs have saved checkpoints, the same call goes on.
        RunsFailedError: the executor takes no runs any more.
        OSError: a run could not write its files; the others have been stopped with checkpoints.
    """
    console = console or Console()
    check_budget(jobs, minutes)
    if not 1 <= shard[0] <= shard[1]:
        raise InputError(f"shard is {shard[0]}/{shard[1]}, expected i/n with i from 1 to n")
    chosen = executor_options("options", executor, {**study.executors.get(executor, {}), **(options or {})})
    deadline = math.inf if minutes is None else time.monotonic() + 60.0 * minutes
    data_ids = {data: data_id(data) for data in dict.fromkeys(settings.data for _, settings in study.runs())}
    note = lambda text: console.print(f"warning: {text}", markup=False, soft_wrap=True)  # noqa: E731
    steps = check_runs(study.path, study.runs(), note, made_here=executor == "local")
    check_free(folder, overwrite=True)
    folder.mkdir(parents=True, exist_ok=True)
    with _begun(study, folder, data_ids, shard):
        plan = Plan(study, folder, data_ids, restart_damaged=restart_damaged, shard=shard)
        with stop_signals() as stop_requested:
            makes = make_executor(executor, chosen, folder.absolute(), jobs)
            on_gpus = any(settings.device.startswith("cuda") for _, settings in study.runs())
            pool = Pool(makes, jobs or makes.default_jobs(on_gpus))
            scheduler = _Scheduler(plan, steps, pool, display_for(console, study.title))
            scheduler.run(lambda: stop_requested() or time.monotonic() > deadline)
    return plan, plan.failures(FAILED, DAMAGED)


def check_budget(jobs: int | None, minutes: float | None) -> None:
    """Raise InputError for a number of runs at once, or of minutes, that makes nothing."""
    if jobs is not None and jobs < 1:
        raise InputError(f"jobs is {jobs}, expected 1 or more")
    if minutes is not None and not minutes > 0:
        raise InputError(f"minutes is {minutes:g}, expected a number above 0")


@contextlib.contextmanager
def _begun(study: Study, folder: Path, data_ids: dict[str, str], shard: tuple[int, int]) -> Iterator[None]:
    """Write what the study is, and hold the folder; of several shards each holds a folder of its own."""
    with contextlib.ExitStack() as held:
        own = shard != (1, 1)
        if own:
            place = folder / SHARDS_FOLDER / f"{shard[0]}-of-{shard[1]}"
            place.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(place))
        writing = held.enter_context(contextlib.ExitStack())
        writing.enter_context(locked(folder, wait=own))
        write_atomically(folder / STUDY_FILE, study.text)
        data_dir = None if study.data_dir is None else str(study.data_dir)
        write_record(folder / DATA_FILE, DATA, {"data_dir": data_dir, "digests": data_ids, "study": sha256(study.text)})
        if own:
            writing.close()
        yield


class _Scheduler:
    """Keeps a pool full until nothing is left to do."""

    def __init__(self, plan: Plan, steps: dict[Settings, int], pool: Pool, display: Display) -> None:
        self.plan, self.steps, self.pool, self.display = plan, steps, pool, display
        self._pace = Pace()
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
                if not self.pool.running:
                    return
                for running, ended in self.pool.wait():
                    self._end(running, ended)
                self.display.show(self._standing())
        finally:
            self.pool.close()
            self.display.stop(self._standing())
        done, total = self._counts
        raise Interrupted(f"stopped with {done} of {total} runs done; the same command goes on in {self.plan.folder}")

    def _start_more(self) -> None:
        running = {running.key for running in self.pool.running}
        for key, name, settings in self._waiting:
            if self.pool.is_full:
                break
            if key not in running:
                folder = self.plan.folder_of(key)
                self.pool.start(key, name, settings, folder, restart_damaged=self.plan.restart_damaged)

    def _end(self, running: Running, ended: Ended) -> None:
        """Note what became of a run."""
        if ended.kind == NOT_WRITTEN:
            raise OSError(f"{running.name}: {ended.message}; the study is stopped, the same command goes on")
        if ended.kind == FINISHED:
            outcome = finished_outcome(running.folder)
        else:
            outcome = Outcome(None, DIVERGED if ended.kind == DIVERGED else FAILED, ended.message)
        self.plan.record(running.key, outcome)
        if outcome.summary is not None:
            self._pace.note(running.settings, outcome.summary["steps"], outcome.summary["seconds"])
            (running.folder / CHECKPOINT_FILE).unlink(missing_ok=True)  # all it was for is done
        self._look_again()
        self.display.ended(running.name, _result(outcome), running.seconds, self._standing())

    def _standing(self) -> Standing:
        running = [(run.name, run.steps.step, run.steps.total) for run in self.pool.running if run.steps is not None]
        return Standing(*self._counts, running, self._pace.left(self._unmade, self.pool.running))


def finished_outcome(folder: Path) -> Outcome:
    """What a run that has ended well, maybe on another machine, came to."""
    deadline = time.monotonic() + _SEEN_SECONDS
    while not (folder / SUMMARY_FILE).is_file():
        if time.monotonic() > deadline:
            return Outcome(None, FAILED, f"{folder}: its {SUMMARY_FILE} is not seen here; do all machines share it?")
        time.sleep(1.0)
    return Outcome(read_summary(folder))


def _result(outcome: Outcome) -> str:
    """What became of a run, in a few words."""
    if outcome.summary is None:
        return f"{outcome.kind}: {outcome.message}"
    summary = outcome.summary
    left = 100.0 * summary["params_after"] / summary["params_before"]
    return f"test {summary['test_accuracy_last']:.2f} %, {left:.1f} % of the parameters"


def _of_the_grid(settings: Settings) -> Settings:
    return settings.changed(architecture_of=None)
