"""Runs on other machines, by submitit (Slurm), Dask or Ray, each in a process of its own there.

All machines need this package and see the folders of the study and of its data under the same paths.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from flatprune.errors import InputError
from flatprune.execution.task import Ended, Task, make_apart
from flatprune.extras import needed_by

Whole = Annotated[int, Field(ge=1)]
LOOK_SECONDS = 0.5
MANY = 1000  # runs handed over at once, of which the cluster makes as many as it can


class Options(BaseModel):
    """Of an executor: what `--executor-option` and the study's file may give."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SubmititOptions(Options):
    """Of a job of Slurm's: one for each run."""

    cluster: Literal["slurm", "local", "debug"] = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: Whole = 60  # minutes; a run that takes longer is queued again and goes on from its checkpoint
    cpus: Whole = 1
    gpus: Annotated[int, Field(ge=0)] = 0
    memory: Annotated[float, Field(gt=0)] | None = None  # GB


class DaskOptions(Options):
    """The address of a scheduler, or the number of workers of a cluster on this machine."""

    address: str | None = None
    workers: Whole | None = None
    resources: str | None = None  # of Dask's workers that a run takes one of, as in GPU


class RayOptions(Options):
    """The address of a cluster ("auto": the one that is running), and what a run takes of it."""

    address: str | None = None
    cpus: Annotated[float, Field(gt=0)] = 1
    gpus: Annotated[float, Field(ge=0)] = 0


class _Remote:
    """What all of them have in common."""

    look_seconds = LOOK_SECONDS

    def default_jobs(self, on_gpus: bool) -> int:
        """More than there are places: the cluster has a queue."""
        return MANY

    def reason(self, error: BaseException) -> str:
        """Why there is no answer."""
        return " ".join(f"{type(error).__name__}: {error}".split())[:500]


class _Requeued:
    """`make_apart`, which submitit queues again when Slurm ends it for its time: the checkpoint is in the folder."""

    def __call__(self, task: Task) -> Ended:
        return make_apart(task)

    def checkpoint(self, task: Task) -> Any:
        import submitit

        return submitit.helpers.DelayedSubmission(self, task)


class Submitit(_Remote):
    """A job of Slurm's for each run; its own output lies in FOLDER/submitit."""

    def __init__(self, options: SubmititOptions, folder: Path) -> None:
        with needed_by("executor submitit"):
            import submitit
        if options.cluster == "slurm" and shutil.which("sbatch") is None:
            raise InputError("executor submitit: there is no sbatch here; expected a machine of a Slurm cluster")
        self._executor = submitit.AutoExecutor(folder / "submitit", cluster=options.cluster)
        given = {"mem_gb": options.memory}
        given |= {f"slurm_{key}": getattr(options, key) for key in ("partition", "account", "qos", "constraint")}
        self._executor.update_parameters(
            name="flatprune",
            timeout_min=options.time,
            cpus_per_task=options.cpus,
            gpus_per_node=options.gpus,
            **{key: value for key, value in given.items() if value is not None},
        )

    def submit(self, task: Task, place: int) -> Any:
        """Queue a job."""
        return self._executor.submit(_Requeued(), task)

    def close(self, *, kill: bool = False) -> None:
        """Jobs end by themselves."""


class Dask(_Remote):
    """A task of a Dask cluster for each run; a worker that dies has its run made by another, from the checkpoint."""

    def __init__(self, options: DaskOptions, jobs: int | None) -> None:
        with needed_by("executor dask"):
            import dask

            with dask.config.set(logging=dict.fromkeys(("distributed", "distributed.client"), "critical")):
                import distributed  # what goes wrong is said in one line
        self._resources = None if options.resources is None else {options.resources: 1}
        self._cluster = None
        if options.address is None:
            self._cluster = distributed.LocalCluster(
                n_workers=1,  # each run has a process of its own anyway
                threads_per_worker=options.workers or jobs or len(os.sched_getaffinity(0)),
                processes=False,
                dashboard_address=":0",
            )
        try:
            self._client = distributed.Client(self._cluster or options.address, timeout=10, set_as_default=False)
        except (OSError, ValueError) as error:
            raise InputError(f"executor dask: no scheduler answers at {options.address} ({error})") from error

    def submit(self, task: Task, place: int) -> Any:
        """Hand over a task."""
        return self._client.submit(make_apart, task, pure=False, resources=self._resources)

    def close(self, *, kill: bool = False) -> None:
        """Leave the cluster; end it if it is ours."""
        self._client.close()
        if self._cluster is not None:
            self._cluster.close()


def _check_reached(address: str) -> None:
    """Raise OSError where nobody listens at HOST:PORT, which Ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


class _RayJob:
    """A future of Ray's, that is cancelled through Ray."""

    def __init__(self, ray: Any, reference: Any) -> None:
        self._ray, self._reference, self._future = ray, reference, reference.future()

    def done(self) -> bool:
        return self._future.done()

    def result(self) -> Ended:
        return self._future.result()

    def cancel(self) -> None:
        self._ray.cancel(self._reference, force=True)


class Ray(_Remote):
    """A task of a Ray cluster for each run, made again, from the checkpoint, where its worker dies."""

    def __init__(self, options: RayOptions, jobs: int | None) -> None:
        with needed_by("executor ray"):
            import ray
        cpus = (jobs or len(os.sched_getaffinity(0))) * options.cpus if options.address is None else None
        try:
            _check_reached(options.address or "")
            ray.init(
                options.address or "local",
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,  # what goes wrong is said in one line
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"executor ray: no cluster answers at {options.address} ({error})") from error
        self._ray = ray
        self._make = ray.remote(num_cpus=options.cpus, num_gpus=options.gpus, max_retries=3)(make_apart)

    def submit(self, task: Task, place: int) -> Any:
        """Hand over a task."""
        return _RayJob(self._ray, self._make.remote(task))

    def close(self, *, kill: bool = False) -> None:
        """Leave the cluster; end it if it is ours."""
        self._ray.shutdown()
