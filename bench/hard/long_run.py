"""A long run with removals: memory, open files and threads stay as they are; a case is a step.

*wrong* where the process has more open files, threads or files in its folder at the end than after a fifth of the
steps, or more than 32 MB of memory more.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
import time
from pathlib import Path

from bench.hard.small_runs import settings, without_report
from bench.hard.tally import Tally
from flatprune import runs
from flatprune.errors import Interrupted
from flatprune.training.trainer import Observer, Trainer

SIZES = {"quick": 1000, "full": 10_000}
STEPS_PER_EPOCH = 30
_MEMORY = 32 << 20
_KINDS = ("bytes of memory", "open files", "threads", "files in the folder")


class Watch(Observer):
    """Looks at the process now and then, and ends the run when its time is over."""

    def __init__(self, folder: Path, deadline: float) -> None:
        self.folder, self.deadline, self.seen = folder, deadline, []
        self.steps = 0

    def step(self, trainer: Trainer) -> None:
        """An optimizer step is done."""
        self.steps = trainer.progress.step
        if self.steps % max(1, trainer.total_steps // 20) == 0:
            self.seen.append(_use(self.folder))
        if time.monotonic() > self.deadline:
            os.kill(os.getpid(), signal.SIGTERM)


def run(cases: int, seed: int, seconds: float) -> Tally:
    """Train for `cases` steps, in which neurons go at every tenth until pruning ends."""
    tally = Tally("long_run", seed)
    begin = time.monotonic()
    without_report()
    epochs = max(3, -(-cases // STEPS_PER_EPOCH))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        watch = Watch(folder, begin + seconds)
        made = settings(
            seed=seed, epochs=epochs, widths=(96, 64), batch_size=4, target_params=0.1, prune_every=10, prune_end=0.9
        )
        with contextlib.suppress(Interrupted):
            runs.run(made, folder, observer=lambda _: watch)
        tally.tried = watch.steps
    first, last = watch.seen[len(watch.seen) // 5], watch.seen[-1]
    for kind, before, after in zip(_KINDS, first, last):
        if after > before + (_MEMORY if kind == _KINDS[0] else 0):
            tally.fault("wrong", f"--seed {seed}: {kind} {before:,} after a fifth of the steps, {after:,} at the end")
    tally.seconds = time.monotonic() - begin
    return tally


def _use(folder: Path) -> tuple[int, int, int, int]:
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident, len(os.listdir("/proc/self/fd")), threading.active_count(), len(list(folder.iterdir()))
