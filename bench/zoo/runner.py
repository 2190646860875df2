"""Each network in a forked process of its own, with limits of time and memory; a JSON that grows with every network."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import resource
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from bench.documents import write_json
from bench.machine import commit, cpu_name
from bench.zoo.checks import AMOUNTS, Record, brief, outcome
from bench.zoo.examine import examine
from bench.zoo.network import Builder

_SIGKILL, _SIGXCPU = -9, -24


@dataclass
class Limits:
    """What a network may take.

    Attributes:
        seconds: CPU seconds of each stage.
        total: CPU seconds of all of it; three times as much by the clock.
        gigabytes: of memory.
    """

    seconds: float = 120.0
    total: float = 300.0
    gigabytes: float = 10.0


@dataclass
class Runner:
    """Runs networks and keeps what became of them.

    Args:
        path: of the JSON; networks that it has already are left out.
        limits: of each network.
        jobs: networks at a time, each on one thread.
    """

    path: Path
    limits: Limits = field(default_factory=Limits)
    jobs: int = 1
    document: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        fresh = {"torch": torch.__version__, "cpu": cpu_name(), "networks": {}}
        self.document = json.loads(self.path.read_text()) if self.path.exists() else fresh

    def left(self, builders: Mapping[str, Builder]) -> list[str]:
        """Names of the networks that the JSON does not have."""
        return [name for name in builders if name not in self.document["networks"]]

    def forget(self, names: Iterable[str]) -> None:
        """Drop what these networks gave before."""
        for name in names:
            self.document["networks"].pop(name, None)

    def run(self, builders: Mapping[str, Builder]) -> None:
        """Run all that are left."""
        torch.set_num_threads(1)  # before the first fork: threads do not survive it
        waiting, running = self.left(builders), {}
        with tempfile.TemporaryDirectory(prefix="zoo-") as folder:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    name = waiting.pop(0)
                    running[name] = self._start(name, builders[name], Path(folder) / f"{name}.json")
                time.sleep(0.05)
                for name, started in list(running.items()):
                    if self._ended(*started):
                        del running[name]
                        self._keep(name, *started[:2], len(waiting) + len(running))

    def _start(self, name: str, build: Builder, path: Path) -> tuple[BaseProcess, Path, float]:
        process = multiprocessing.get_context("fork").Process(target=_child, args=(build, path, self.limits), name=name)
        process.start()
        return process, path, time.monotonic()

    def _ended(self, process: BaseProcess, path: Path, start: float) -> bool:
        if process.is_alive() and time.monotonic() - start > 3 * self.limits.total:
            process.kill()
        process.join(0)
        return not process.is_alive()

    def _keep(self, name: str, process: BaseProcess, path: Path, left: int) -> None:
        record: Record = json.loads(path.read_text()) if path.exists() else {}
        if not record.get("finished"):
            record["error"] = _cause(process.exitcode, self.limits)
        self.document["networks"][name] = {**record, "commit": commit()}
        write_json(self.path, self.document)
        print(f"{name}: {summary(record)} ({left} left)", flush=True)


def _child(build: Builder, path: Path, limits: Limits) -> None:
    for what, most in ((resource.RLIMIT_CPU, limits.total), (resource.RLIMIT_AS, limits.gigabytes * 2**30)):
        resource.setrlimit(what, (int(most), int(most)))
    os.setpgrp()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # what packages say while they build
        try:
            examine(build, limits.seconds, lambda found: write_json(path, found))
        except Exception as error:  # the builder's own, say
            write_json(path, {"error": brief(error), "finished": True})


def _cause(exit_code: int | None, limits: Limits) -> str:
    if exit_code in (_SIGKILL, _SIGXCPU):
        return f"ended: over {limits.total:g} CPU s, or out of memory"
    return f"ended with exit code {exit_code}"


def summary(record: Record) -> str:
    """One line of an outcome."""
    parts = []
    for stage in ("coupling", *AMOUNTS, "l1", "obs"):
        found = record.get(stage)
        if found is None:
            continue
        if "error" in found:
            parts.append(f"{stage} {found['error']}")
        elif stage == "coupling":
            parts.append(f"{found['could_go']:.1%} could go in {found['cpu']:.3g} s")
        elif stage in AMOUNTS:
            parts.append(f"{stage} {share(found)}")
        else:
            parts.append(f"{stage} {found['left']:.0%} left")
    return "; ".join([*parts, *filter(None, [record.get("error")])])


def share(found: Record) -> str:
    """Cut against masked as people read it."""
    counts = outcome(found)
    return f"{counts['share']:.0e}" if "share" in counts else counts["error"]


def chosen(builders: Mapping[str, Builder], patterns: Sequence[str]) -> dict[str, Builder]:
    """Those whose names match any of some regular expressions; all for none."""
    return {name: b for name, b in builders.items() if not patterns or any(re.search(p, name) for p in patterns)}
