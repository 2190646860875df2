"""Kills: a short run is ended by SIGKILL at a random write or a random moment, and resumed, perhaps killed once more.

A case is *lost* where the run that was killed and resumed has not the same network, bit by bit, the same history and
the same summary as the one that was not, or a file that `flatprune check` does not call whole; *unclear* where it
cannot be resumed; *crashed* where it hangs.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.hard.forks import Ended, forked
from bench.hard.small_runs import result, settings, without_report
from bench.hard.tally import Tally
from flatprune import runs
from flatprune.runs.folder import FINE, RUN_FILES, check_run

SIZES = {"quick": 20, "full": 500}
_CALLS = ("open", "fsync", "replace", "unlink", "mkdir")  # of the module os; each kill is before or after one
_MOST_KILLS = 3


def run(cases: int, seed: int, seconds: float, first: int = 0) -> Tally:
    """Kill `cases` runs, beginning with the one of number `first`."""
    tally = Tally("kills", seed, next=first)
    begin = time.monotonic()
    without_report()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        _make(folder / "whole")  # here, so that the forks need not load and compile what a first run does
        start = time.monotonic()
        calls = forked(lambda: _count(lambda: _make(folder / "counted"))).value
        duration = time.monotonic() - start
        wanted = result(folder / "whole")
        for case in range(first, first + cases):
            if time.monotonic() - begin > seconds:
                break
            rng, name = random.Random(f"{seed} {case}"), f"--seed {seed} --only {case}"
            _case(tally, folder / "run", rng, name, calls, duration, wanted)
            tally.next = case + 1
    tally.seconds = time.monotonic() - begin
    return tally


def _make(folder: Path) -> None:
    """As a user does: resume where there is something to resume, else begin."""
    if any((folder / name).exists() for name in RUN_FILES):
        runs.resume(folder)
    else:
        runs.run(settings(compare_dense=True), folder)


def _case(tally: Tally, folder: Path, rng: random.Random, name: str, calls: int, duration: float, wanted: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    tally.tried += 1
    kills = rng.randint(1, _MOST_KILLS)
    for _ in range(kills):
        ended = _killed(folder, rng, calls, duration)
        if ended.hung:
            tally.fault("crashed", f"{name}: hung")
            return
        if ended.signal != signal.SIGKILL:
            break  # it was over before, or refused, which the last call shows
    ended = forked(lambda: _kept(lambda: _make(folder)))
    if ended.value is None:
        tally.fault("crashed", f"{name}: resumed: {'hung' if ended.hung else f'signal {ended.signal}'}")
    elif ended.value:
        tally.fault("unclear", f"{name}: resumed: {ended.value}")
    elif result(folder) != wanted:
        tally.fault("lost", f"{name}: ends otherwise")
    elif wrong := {file: state for file, state in check_run(folder).items() if state not in FINE}:
        tally.fault("lost", f"{name}: {wrong}")


def _killed(folder: Path, rng: random.Random, calls: int, duration: float) -> Ended:
    """Begin or resume the run, and kill it at a call or a moment somewhere on its way."""
    if rng.random() < 0.3:
        return forked(lambda: _kept(lambda: _make(folder)), kill_after=rng.uniform(0.0, 1.2 * duration))
    at, before = rng.randrange(calls), rng.random() < 0.5
    return forked(lambda: _kept(lambda: _count(lambda: _make(folder), at, before)))


def _kept(function: Callable[[], Any]) -> str:
    try:
        function()
    except Exception as error:
        return repr(error)
    return ""


def _count(function: Callable[[], None], at: int = -1, before: bool = True) -> int:
    """Call a function; the number of calls that change the disk, of which number `at` kills the process."""
    count = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal count
            count += 1
            if count - 1 == at and before:
                os.kill(os.getpid(), signal.SIGKILL)
            value = real(*arguments, **more)
            if count - 1 == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return value

        return call

    for name in _CALLS:
        setattr(os, name, counted(getattr(os, name)))
    function()
    return count
