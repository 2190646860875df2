"""All checks of one network, one after the other, in the process that calls it; what is known is handed on at once."""

from __future__ import annotations

import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bench.zoo.checks import AMOUNTS, Record, brief, cut_and_masked, find, train
from bench.zoo.environment import ROOT
from bench.zoo.network import Builder

CHEAP = 500_000  # parameters, above which the default criterion is not tried


class Slow(Exception):  # noqa: N818 - says what became of a stage, not that something is wrong
    """A stage has used up its time."""


def examine(build: Builder, seconds: float, keep: Callable[[Record], None]) -> Record:
    """Everything about one network.

    Args:
        build: makes it; it is made anew for each training.
        seconds: of CPU time that each stage may take.
        keep: called with the record after each stage.

    Returns:
        The record: "parameters", then what each stage of `bench.zoo.checks` found, or its "error".
    """
    record: Record = {}
    warnings.simplefilter("ignore")

    def stage(name: str, work: Callable[[], Any]) -> Any:
        try:
            with _limited(seconds):
                outcome = work()
        except (Exception, Slow) as error:
            record[name] = {"error": f"over {seconds:g} CPU s" if isinstance(error, Slow) else brief(error)}
            if not isinstance(error, Slow):
                record[name]["trace"] = traceback.format_exc(limit=-6).replace(f"{ROOT}/", "").splitlines()
            outcome = None
        else:
            record[name] = outcome[1] if isinstance(outcome, tuple) else outcome
        keep(record)
        return outcome

    torch.manual_seed(0)
    network = build()
    record["parameters"] = sum(parameter.numel() for parameter in network.model.parameters())
    found = stage("coupling", lambda: find(network))
    if found is not None and found[0].groups:
        for name, amount in AMOUNTS.items():
            stage(name, lambda amount=amount: cut_and_masked(network, found[0], amount))
    stage("l1", lambda: train(build(), "l1"))
    if record["parameters"] <= CHEAP and "error" not in record["l1"]:
        stage("obs", lambda: train(build(), "obs"))
    record["finished"] = True
    keep(record)
    return record


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise Slow once so much CPU time is gone, as soon as Python code runs again."""

    def late(*_: Any) -> None:
        raise Slow

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
