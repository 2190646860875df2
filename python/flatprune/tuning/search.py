"""The search: Optuna draws settings and ends trials early, runs in processes of their own make them.

A search lies in a folder: `trials.db`, Optuna's storage (SQLite), in which `optuna-dashboard` and Optuna's own plots
can look; `trials/NUMBER`, the run of each trial; `trials.csv`, all of them; `lock`.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from flatprune.errors import InputError, Interrupted
from flatprune.execution import DIVERGED, Ended, Pool, Running, executor_options, make_executor
from flatprune.execution.task import FINISHED, NOT_WRITTEN, STOPPED
from flatprune.extras import needed_by
from flatprune.files.atomic import write_atomically
from flatprune.files.finished import HISTORY_FILE, read_history
from flatprune.files.lock import locked
from flatprune.runs.folder import CHECKPOINT_FILE, check_free
from flatprune.settings import Settings
from flatprune.signals import stop_signals
from flatprune.study.check import check_runs
from flatprune.study.display import Standing, display_for
from flatprune.study.plan import data_id
from flatprune.study.schedule import check_budget, finished_outcome
from flatprune.study.tables import Table
from flatprune.tuning.space import Tuning
from flatprune.values import label

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

EARLY = ("median", "halving", "never")
STORAGE_FILE, TRIALS_FOLDER, TABLE_FILE = "trials.db", "trials", "trials.csv"
_SHOWN = 5
_ENDED_EARLY, _NOTE, _LEFT, _WHAT = "ended early", "note", "params_left", "what"  # attributes of trials, of the search


def tune(
    tuning: Tuning,
    folder: Path,
    *,
    trials: int = 50,
    minutes: float | None = None,
    early: str = "median",
    jobs: int | None = 1,
    executor: str = "local",
    options: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> Search:
    """Make trials until there are so many in the folder.

    The objective is the accuracy on held-out training images after the last epoch; a run that diverges, or whose
    network does not come down to the wanted size, counts as 0 %. The accuracy after every epoch decides which trials
    are ended early. With one job the search is the same every time.

    Args:
        tuning: what to search.
        folder: of the search, made if it is not there.
        trials: altogether, those of calls before included.
        minutes: begin no trial and stop those at work after so many; default never.
        early: "median" ends a trial that is below the median of others at the same epoch (after five trials, and a
            fifth of the epochs), "halving" all but the best quarter at epochs 1, 4, 16, ...; or "never".
        jobs: trials at once; None: as many as the executor can. Those at work are not known to the next draw.
        executor, options: who makes them, as for `flatprune.study.run_study`.
        console: where the progress is shown.

    Returns:
        All trials.

    Raises:
        InputError: something cannot be used, or the folder holds another search.
        MissingPackageError: Optuna is not installed, or the executor's package.
        Interrupted: SIGINT or SIGTERM; trials at work have saved checkpoints, the same call goes on with them.
        OSError: a run could not write its files.
    """
    console = console or Console()
    check_budget(jobs, minutes)
    if trials < 1:
        raise InputError(f"trials is {trials}, expected 1 or more")
    if early not in EARLY:
        raise InputError(f"early is {early!r}, expected one of {', '.join(EARLY)}")
    chosen = executor_options("options", executor, {**tuning.executors.get(executor, {}), **(options or {})})
    with needed_by("flatprune tune"):
        import optuna
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    note = lambda text: console.print(f"warning: {text}", markup=False, soft_wrap=True)  # noqa: E731
    check_runs(tuning.path, [("base", tuning.judged({}))], note, made_here=executor == "local")
    deadline = math.inf if minutes is None else time.monotonic() + 60.0 * minutes
    check_free(folder, overwrite=True)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder), stop_signals() as stop_requested:
        search = Search(tuning, folder, _opened(tuning, folder, early))
        makes = make_executor(executor, chosen, folder.absolute(), jobs)
        on_gpus = str(tuning.base.get("device", "cpu")).startswith("cuda")
        loop = _Loop(search, trials, Pool(makes, jobs or makes.default_jobs(on_gpus)), console)
        try:
            loop.run(lambda: stop_requested() or time.monotonic() > deadline)
        finally:
            search.write_table()
        if stop_requested():
            raise Interrupted(
                f"stopped with {len(search.ended)} of {trials} trials; the same command goes on in {folder}"
            )
    return search


def _opened(tuning: Tuning, folder: Path, early: str) -> Study:
    """Optuna's study in the folder."""
    import optuna

    pruners = {
        "median": lambda: optuna.pruners.MedianPruner(n_warmup_steps=tuning.settings({}).epochs // 5),
        "halving": lambda: optuna.pruners.SuccessiveHalvingPruner(),
        "never": lambda: optuna.pruners.NopPruner(),
    }
    try:
        storage = f"sqlite:///{(folder / STORAGE_FILE).absolute()}"
        study = optuna.create_study(
            storage=storage,
            study_name="flatprune",
            direction="maximize",
            pruner=pruners[early](),
            load_if_exists=True,
        )
        number = len(study.get_trials(deepcopy=False))
    except Exception as error:
        if isinstance(error, (InputError, OSError)):
            raise
        line = str(error).split("\n")[0]
        raise InputError(f"{folder / STORAGE_FILE}: cannot be used ({type(error).__name__}: {line})") from error
    study.sampler = optuna.samplers.TPESampler(seed=tuning.settings({}).seed % 2**31 + number)  # other draws each time
    what = _digest(tuning)
    if study.user_attrs.setdefault(_WHAT, what) != what:
        raise InputError(f"{folder}: holds trials of another base or space than {tuning.path}; use another folder")
    study.set_user_attr(_WHAT, what)
    return study


def _digest(tuning: Tuning) -> str:
    """Of all that trials have in common, so that those of one folder can be compared."""
    base = tuning.judged({}).changed(device="cpu", threads=None).as_dict()
    space = {name: [type(place).__name__, repr(place)] for name, place in tuning.space.items()}
    text = json.dumps([base, data_id(base["data"]), space], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Search:
    """Trials in a folder.

    Attributes:
        tuning: what is searched.
        folder: of the search.
        study: Optuna's.
    """

    tuning: Tuning
    folder: Path
    study: Study

    def __post_init__(self) -> None:
        self.failed: dict[int, str] = {}

    @property
    def trials(self) -> list[FrozenTrial]:
        """All, in the order that they were drawn."""
        return self.study.get_trials(deepcopy=False)

    @property
    def ended(self) -> list[FrozenTrial]:
        """Those that are not at work, nor wait for going on."""
        return [trial for trial in self.trials if trial.state.is_finished()]

    @property
    def ranked(self) -> list[FrozenTrial]:
        """Those that came to an end with a network of the wanted size, the best first; of equal ones the first."""
        whole = [trial for trial in self.trials if not _state(trial)]
        return sorted(whole, key=lambda trial: (-(trial.value or 0.0), trial.number))

    @property
    def best(self) -> Settings | None:
        """Settings of a run on all training images, tested on the test images, as the best trial had them."""
        return self.tuning.settings(self.ranked[0].params) if self.ranked else None

    def folder_of(self, number: int) -> Path:
        """Where the run of a trial lies."""
        return self.folder / TRIALS_FOLDER / f"{number:04d}"

    def table(self) -> Table:
        """The best trials."""
        names = tuple(self.tuning.space)
        rows = [
            (
                str(trial.number),
                *(label(trial.params[name]) for name in names),
                f"{trial.value:.2f}",
                f"{trial.user_attrs[_LEFT]:.1f}",
            )
            for trial in self.ranked[:_SHOWN]
        ]
        head = ("trial", *names, "held-out accuracy, %", "parameters left, %")
        return Table(f"{self.tuning.title}: {self.counts}", head, tuple(rows), left=0)

    @property
    def counts(self) -> str:
        """How many trials came to what, in words."""
        notes = [_state(trial) for trial in self.trials]
        found = {name: notes.count(name) for name in dict.fromkeys(notes)}
        return f"{len(notes)} trials" + "".join(f", {count} {name}" for name, count in found.items() if name)

    def write_table(self) -> None:
        """Write all trials as CSV."""
        text = io.StringIO()
        names = tuple(self.tuning.space)
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["trial", *names, "held_out_accuracy", _LEFT, "epochs", "state", "note"])
        for trial in self.trials:
            last = max(trial.intermediate_values, default=0)
            drawn = [trial.params.get(name, "") for name in names]
            accuracy = trial.value if trial.state.name == "COMPLETE" else ""
            own = [accuracy, trial.user_attrs.get(_LEFT, ""), last, _state(trial), trial.user_attrs.get(_NOTE, "")]
            writer.writerow([trial.number, *drawn, *own])
        write_atomically(self.folder / TABLE_FILE, text.getvalue())


def _state(trial: FrozenTrial) -> str:
    """What became of a trial; an empty text for one that came to its end."""
    if trial.user_attrs.get(_WHAT):
        return trial.user_attrs[_WHAT]
    return {"RUNNING": "unfinished", "PRUNED": _ENDED_EARLY, "FAIL": "refused"}.get(trial.state.name, "")


class _Loop:
    """Draws, has made, and tells Optuna."""

    def __init__(self, search: Search, number: int, pool: Pool, console: Console) -> None:
        from optuna.trial import Trial

        self.search, self.number, self.pool = search, number, pool
        self.display = display_for(console, search.tuning.title, "trials")
        self._distributions = {name: place.distribution() for name, place in search.tuning.space.items()}
        open_ones = [trial for trial in search.trials if not trial.state.is_finished()]
        self._waiting = [Trial(search.study, trial._trial_id) for trial in open_ones]
        self._drawn = len(search.trials)
        self._trials: dict[str, Trial] = {}
        self._reported: dict[str, int] = {}

    def run(self, stop_requested: Any) -> None:
        """Make the trials."""
        self.display.start(self._standing())
        try:
            while not stop_requested():
                while not self.pool.is_full and self._start_one():
                    pass
                if not self.pool.running:
                    return
                for running, ended in self.pool.wait():
                    self._end(running, ended)
                for running in self.pool.running:
                    if not running.asked_to_stop and self._is_hopeless(running):
                        self.pool.stop(running)
                self.display.show(self._standing())
        finally:
            self.pool.close()
            self.display.stop(self._standing())

    def _start_one(self) -> bool:
        """Begin with another trial; whether there was one."""
        if self._waiting:
            trial = self._waiting.pop(0)
        elif self._drawn < self.number:
            trial = self.search.study.ask(self._distributions)
            self._drawn += 1
        else:
            return False
        try:
            settings = self.search.tuning.judged(trial.params)
        except InputError as error:
            self._refuse(trial, error)
            return True
        key = str(trial.number)
        self._trials[key] = trial
        self._reported[key] = max(self.search.trials[trial.number].intermediate_values, default=0)
        drawn = ", ".join(f"{name} {label(value)}" for name, value in trial.params.items())
        self.pool.start(
            key, f"trial {key}: {drawn}", settings, self.search.folder_of(trial.number), restart_damaged=True
        )
        return True

    def _refuse(self, trial: Trial, error: InputError) -> None:
        from optuna.trial import TrialState

        trial.set_user_attr(_NOTE, str(error))
        self.search.study.tell(trial, state=TrialState.FAIL)
        self.display.ended(f"trial {trial.number}", f"refused: {error}", 0.0, self._standing())

    def _is_hopeless(self, running: Running) -> bool:
        """Report epochs that are new, in order; whether the trial is to be ended at one of them."""
        trial = self._trials[running.key]
        for epoch, accuracy in _tested(running.folder):
            if epoch > self._reported[running.key]:
                self._reported[running.key] = epoch
                trial.report(accuracy, epoch)
                if trial.should_prune():
                    return True
        return False

    def _end(self, running: Running, ended: Ended) -> None:
        """Tell Optuna what a trial came to; one that failed is left open, for the next call."""
        from optuna.trial import TrialState

        if ended.kind == NOT_WRITTEN:
            raise OSError(f"{running.name}: {ended.message}; the search is stopped, the same command goes on")
        trial, tell = self._trials[running.key], self.search.study.tell
        if running.asked_to_stop or (ended.kind in (FINISHED, DIVERGED) and self._is_hopeless(running)):
            result = _ENDED_EARLY
            tell(trial, state=TrialState.PRUNED)
        elif ended.kind == DIVERGED:
            result = self._worthless(trial, "diverged", ended.message)
        elif ended.kind == FINISHED:
            result = self._finished(trial, running)
        else:
            self.search.failed[trial.number] = ended.message
            result = f"{'stopped' if ended.kind == STOPPED else 'failed'}: {ended.message}"
        if trial.number not in self.search.failed:
            (running.folder / CHECKPOINT_FILE).unlink(missing_ok=True)  # all it was for is done
        self.display.ended(running.name, result, running.seconds, self._standing())

    def _finished(self, trial: Trial, running: Running) -> str:
        outcome = finished_outcome(running.folder)
        if outcome.summary is None:
            self.search.failed[trial.number] = outcome.message
            return f"failed: {outcome.message}"
        summary = outcome.summary
        left = 100.0 * summary["params_after"] / summary["params_before"]
        trial.set_user_attr(_LEFT, left)
        if summary["pruning_stopped"]:
            return self._worthless(trial, "too large", summary["pruning_stopped"])
        accuracy = summary["test_accuracy_last"]
        self.search.study.tell(trial, accuracy)
        return f"held out {accuracy:.2f} %, {left:.1f} % of the parameters"

    def _worthless(self, trial: Trial, what: str, why: str) -> str:
        trial.set_user_attr(_WHAT, what)
        trial.set_user_attr(_NOTE, why)
        self.search.study.tell(trial, 0.0)
        return f"{what}: {why}"

    def _standing(self) -> Standing:
        running = [(run.name, run.steps.step, run.steps.total) for run in self.pool.running if run.steps is not None]
        return Standing(len(self.search.ended), max(self.number, self._drawn), running, None)


def _tested(folder: Path) -> list[tuple[int, float]]:
    """(epoch, accuracy) of every epoch of a run after which it was tested."""
    with contextlib.suppress(InputError):  # not there yet
        records = [record for record in read_history(folder / HISTORY_FILE) if record["kind"] == "epoch"]
        return [(record["epoch"], record["test_accuracy"]) for record in records if record["test_accuracy"] is not None]
    return []
