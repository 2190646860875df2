"""Runs in processes of their own, on this machine or on a cluster, by executors that other people keep.

A `Pool` holds so many runs at once; which processes make them is the business of its `Executor` (`EXECUTORS` has all by
name). A run is the same wherever it is made: it works in its folder, which every machine has to see, and tells through
it how far it is (`flatprune.execution.task`).
"""

from flatprune.execution.executors import EXECUTORS, Executor, executor_options, make_executor
from flatprune.execution.pool import Pool, Running
from flatprune.execution.task import DIVERGED, FAILED, Ended, Steps, Task

__all__ = [
    "DIVERGED",
    "EXECUTORS",
    "FAILED",
    "Ended",
    "Executor",
    "Pool",
    "Running",
    "Steps",
    "Task",
    "executor_options",
    "make_executor",
]
