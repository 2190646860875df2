"""`make gpu-bench`: every family on every network, training steps, stalls of kernels; each in a process of its own."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator

from bench.gpu.check import begin
from bench.gpu.names import FAMILIES, NETWORKS, TRAINED
from bench.gpu.run import Run, Step

MINUTES = 5.7
_LIMIT, _TRAINING_LIMIT, _EXPERIMENT_LIMIT = 25.0, 45.0, 45.0  # seconds


def bench(run: Run, dry: bool) -> None:
    """All of it, what is most wanted first."""
    begin(run, dry)
    run.steps(plan(run, dry))


def plan(run: Run, dry: bool) -> Iterator[Step]:
    """The device's ceilings; the first networks in all families; training; the other networks; a whole run."""
    yield _measured("ceilings", "-", dry)
    for network in NETWORKS[:2]:
        for family in FAMILIES:
            yield _measured(family, network, dry)
    for network in TRAINED:
        yield _python(f"training, {network}", ("bench.gpu.training", network), dry, _TRAINING_LIMIT)
    yield from stalls(dry)
    for network in NETWORKS[2:]:
        for family in FAMILIES:
            yield _measured(family, network, dry)
    yield experiment(run, dry)


# family -> its kernels that take longest
_PROFILED = {"inverses": "inverse_(pivot|panel|update)", "covariance": "covariance_(pack|tiles|expand)"}
_SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "SchedulerStats", "WarpStateStats")


def stalls(dry: bool) -> Iterator[Step]:
    """What a few launches wait for, by the hardware's counters, where there is an ncu; its words are the log."""
    program = shutil.which("ncu")
    for family, kernels in _PROFILED.items():
        once = (sys.executable, "-m", "bench.gpu.suite", family, NETWORKS[0], "--once", *(["--dry"] if dry else []))
        sections = [word for section in _SECTIONS for word in ("--section", section)]
        options = ("--clock-control", "none", "--kernel-name", f"regex:{kernels}", "--launch-count", "6")
        profiled = (program, *options, *sections) if program and not dry else ()
        if program or dry:
            yield Step(f"stalls, {family}", (*profiled, *once), _TRAINING_LIMIT)


def experiment(run: Run, dry: bool) -> Step:
    """`flatprune run` from beginning to end."""
    goal = ("--data", "digits", "--model", "mlp", "--target-params", "0.1", "--epochs", "1" if dry else "40")
    place = ("--device", "cpu" if dry else "cuda", "--out", str(run.folder / "runs" / "digits"), "--overwrite")
    return Step("flatprune run", (sys.executable, "-m", "flatprune", "run", *goal, *place), _EXPERIMENT_LIMIT)


def _measured(family: str, network: str, dry: bool) -> Step:
    name = f"{family}, {network}" if family in FAMILIES else family
    return _python(name, ("bench.gpu.suite", family, network), dry, _LIMIT)


def _python(name: str, module: tuple[str, ...], dry: bool, limit: float) -> Step:
    return Step(name, (sys.executable, "-m", *module, *(["--dry"] if dry else [])), limit, writes=True)
