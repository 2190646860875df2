"""`make gpu-bench`: families on networks, training steps, stalls of kernels, whole runs; each in its own process."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator

from bench.gpu.check import begin
from bench.gpu.names import FAMILIES, NETWORKS, TRAINED, WHOLE_RUNS
from bench.gpu.run import Run, Step

MINUTES = 5.7
_LIMIT, _TRAINING_LIMIT, _RUN_LIMIT = 25.0, 45.0, 60.0  # seconds


def bench(run: Run, dry: bool) -> None:
    """All of it, what is most wanted first."""
    begin(run, dry)
    ceilings = run.step(_measured("ceilings", "-", dry)) or {}
    run.keep("rates_before", ceilings.get("result", {}))
    run.steps(plan(dry))


def plan(dry: bool) -> Iterator[Step]:
    """The first networks in all families; training; stalls; the other networks; whole runs."""
    for network in NETWORKS[:2]:
        for family in FAMILIES:
            yield _measured(family, network, dry)
    for network in TRAINED:
        yield _python(f"training, {network}", ("bench.gpu.training", network), dry, _TRAINING_LIMIT)
    yield from stalls(dry)
    for network in NETWORKS[2:]:
        for family in FAMILIES:
            yield _measured(family, network, dry)
    for network in WHOLE_RUNS:
        yield _python(f"whole run, {network}", ("bench.gpu.whole_run", network), dry, _RUN_LIMIT)


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


def _measured(family: str, network: str, dry: bool) -> Step:
    name = f"{family}, {network}" if family in FAMILIES else family
    return _python(name, ("bench.gpu.suite", family, network), dry, _LIMIT)


def _python(name: str, module: tuple[str, ...], dry: bool, limit: float) -> Step:
    return Step(name, (sys.executable, "-m", *module, *(["--dry"] if dry else [])), limit, writes=True)
