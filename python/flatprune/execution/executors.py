"""Executors by name, and their options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from flatprune.errors import InputError, did_you_mean
from flatprune.execution.clusters import Dask, DaskOptions, Options, Ray, RayOptions, Submitit, SubmititOptions
from flatprune.execution.local import Local
from flatprune.execution.task import Ended, Task
from flatprune.faults import first_fault


class Job(Protocol):
    """A task that was handed over: a future."""

    def done(self) -> bool:
        """Whether `result` answers at once."""

    def result(self) -> Ended:
        """What became of it; raises where the process that had it is gone."""

    def cancel(self) -> Any:
        """Take it back, where it has not begun."""


class Executor(Protocol):
    """Has tasks made by other processes.

    Attributes:
        look_seconds: how often it is worth looking at what has ended.
    """

    look_seconds: float

    def default_jobs(self, on_gpus: bool) -> int:
        """Tasks that it is given at once, where nobody says."""

    def submit(self, task: Task, place: int) -> Job:
        """Hand over a task; `place` is a number below that of the tasks at once, which no other of them has."""

    def reason(self, error: BaseException) -> str:
        """What an error of `Job.result` says, in one line."""

    def close(self, *, kill: bool = False) -> None:
        """Let go of everything; with tasks left, these are killed where that can be."""


EXECUTORS: dict[str, type[Options]] = {
    "local": Options,
    "submitit": SubmititOptions,
    "dask": DaskOptions,
    "ray": RayOptions,
}
"""Name -> what its options are."""


def executor_options(where: str, name: str, given: Mapping[str, Any]) -> Options:
    """The options of an executor, checked.

    Args:
        where: begins the message of an error.
        name: of EXECUTORS.
        given: key -> value; texts that mean a number are one.

    Raises:
        InputError: there is no such executor or option, or a value does not fit.
    """
    if name not in EXECUTORS:
        raise InputError(f"{where}: there is no executor {name!r}; {did_you_mean(name, EXECUTORS)}")
    fields = EXECUTORS[name].model_fields
    for key in given:
        if key not in fields:
            known = did_you_mean(str(key), fields) if fields else "it has none"
            raise InputError(f"{where}: executor {name} has no option {key!r}; {known}")
    try:
        return EXECUTORS[name](**given)
    except ValidationError as error:
        raise InputError(f"{where}: executor {name}: {first_fault(error, fields)}") from None


def make_executor(name: str, options: Options, folder: Path, jobs: int | None) -> Executor:
    """Start an executor, or reach the cluster that it is on.

    Args:
        name: of EXECUTORS.
        options: from `executor_options`.
        folder: for files of its own.
        jobs: tasks at once, None for its default.

    Raises:
        InputError: there is no such cluster.
        MissingPackageError: its package is not installed.
    """
    if isinstance(options, SubmititOptions):
        return Submitit(options, folder)
    if isinstance(options, DaskOptions):
        return Dask(options, jobs)
    if isinstance(options, RayOptions):
        return Ray(options, jobs)
    return Local()
