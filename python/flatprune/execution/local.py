"""Runs on this machine: each place has a process that makes one after the other, by loky."""

from __future__ import annotations

import os
import re
import signal
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

import torch
from loky import ProcessPoolExecutor

from flatprune.execution.task import Ended, Task, detach, make

_SIGNAL = re.compile(r"SIG\w+\(-\d+\)")
_OF_THE_TERMINAL = (signal.SIGINT, signal.SIGHUP)  # the study's own, which stops its runs in good order


class Local:
    """An executor of loky's with one process for each place, so that one that is killed takes no other along.

    Only the first run in a place waits for the process to start, and those whose environment is another.
    """

    look_seconds = 0.05

    def __init__(self) -> None:
        self._places: dict[int, tuple[dict[str, str], ProcessPoolExecutor]] = {}

    def default_jobs(self, on_gpus: bool) -> int:
        """As many as there are GPUs or cores."""
        return max(1, torch.cuda.device_count()) if on_gpus else len(os.sched_getaffinity(0))

    def submit(self, task: Task, place: int) -> Future[Ended]:
        """Begin with a run."""
        environment = {**task.environment, **_visible_gpu(task, place)}
        kept = self._places.get(place)
        if kept is not None and kept[0] == environment:
            try:
                return kept[1].submit(make, task)
            except BrokenProcessPool:  # killed between two runs, or in the last one
                pass
        if kept is not None:
            kept[1].shutdown()
        executor = ProcessPoolExecutor(max_workers=1, env=environment, initializer=detach)
        self._places[place] = environment, executor
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_TERMINAL)  # a new process inherits the mask
        try:
            return executor.submit(make, task)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def reason(self, error: BaseException) -> str:
        """Why there is no answer from a process."""
        if isinstance(error, BrokenProcessPool):
            return f"ended by {' and '.join(_SIGNAL.findall(str(error))) or 'itself'}"
        return f"{type(error).__name__}: {error}"

    def close(self, *, kill: bool = False) -> None:
        """End the processes."""
        for _, executor in self._places.values():
            executor.shutdown(kill_workers=kill)
        self._places = {}


def _visible_gpu(task: Task, place: int) -> dict[str, str]:
    """A GPU for each place; "cuda:1" means that one for all."""
    if task.device != "cuda":
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": devices[place % len(devices)]}
