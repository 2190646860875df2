"""Killed ranks: a run of several processes loses one to SIGKILL at a random moment, and torchrun starts it again.

A case is *lost* where the run has not the network, the history and the summary of the one that was left in peace, bit
by bit; *unclear* where torchrun gave up; *crashed* where it hangs.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.hard.small_runs import result
from bench.hard.tally import Tally

SIZES = {"quick": 2, "full": 20}
_RANKS, _MOST_KILLS = 2, 2
_LIMIT = 180.0  # seconds of a case
_RUN = """
import sys
from pathlib import Path
from bench.hard.small_runs import settings, without_report
from flatprune import runs
without_report()
runs.run(settings(epochs=6), Path(sys.argv[1]))
"""


def run(cases: int, seed: int, seconds: float, first: int = 0) -> Tally:
    """Kill ranks of `cases` runs, beginning with the one of number `first`."""
    tally = Tally("rank_kills", seed, next=first)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "train.py").write_text(_RUN)
        code, duration = _trained(folder, "whole", [])
        assert code == 0, "the run that was left in peace failed"
        wanted = result(folder / "whole")
        for case in range(first, first + cases):
            if time.monotonic() - begin > seconds:
                break
            rng = random.Random(f"{seed} {case}")
            moments = sorted(rng.uniform(0.1, 1.0) * duration for _ in range(rng.randint(1, _MOST_KILLS)))
            shutil.rmtree(folder / "run", ignore_errors=True)
            _judge(tally, folder, f"--seed {seed} --only {case}", moments, wanted)
            tally.next = case + 1
    tally.seconds = time.monotonic() - begin
    return tally


def _judge(tally: Tally, folder: Path, name: str, moments: list[float], wanted: str) -> None:
    tally.tried += 1
    code, _ = _trained(folder, "run", moments)
    if code is None:
        tally.fault("crashed", f"{name}: hung")
    elif code:
        tally.fault("unclear", f"{name}: torchrun ended with {code}: {_complaints(folder / 'log')}")
    elif result(folder / "run") != wanted:
        tally.fault("lost", f"{name}: ends otherwise")


def _complaints(log: Path) -> str:
    """What the ranks' output says of errors."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return " | ".join(dict.fromkeys(line for line in lines if re.search(r"rror\b|exitcode|refused", line)))[:2000]


def _trained(folder: Path, name: str, moments: list[float]) -> tuple[int | None, float]:
    """The exit status of torchrun (None: it hung) and its seconds; at each of the moments a rank is killed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={_RANKS}"]
    command += [f"--max-restarts={max(len(moments), 1)}", str(folder / "train.py"), str(folder / name)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    start = time.monotonic()
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            for number, moment in enumerate(moments):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(start + moment - time.monotonic(), 0.0))
                _kill_one(process.pid, number)
            process.wait(_LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None, time.monotonic() - start
    return process.returncode, time.monotonic() - start


def _kill_one(agent: int, number: int) -> None:
    """Kill one of the processes that torchrun has started, if there are any."""
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
        if children:
            os.kill(int(children[number % len(children)]), signal.SIGKILL)
