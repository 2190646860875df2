"""The runs of the study, and the folder that keeps one JSON for each that has ended."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.machine import ROOT, commit, cpu_name, version
from bench.rivals.method import Method, all_methods
from bench.rivals.tasks import TARGETS, TASKS, Task
from flatprune.errors import InputError
from flatprune.files.atomic import write_atomically

STAMP = "study.json"
FIRST_SEED, FIRST_TUNING_SEED = 11, 101  # those that knobs are chosen on have no part in the tables
WHOLE = "whole"  # the target of what does not depend on it
SOURCES = ("kfac_ext", "python/flatprune", "bench/rivals")  # what figures depend on
_OTHERS = ("plan.py", "runner.py", "report.py", "examples.py", "__main__.py")  # of bench/rivals, that decide nothing
DISTRIBUTIONS = ("torch", "numpy", "torch-pruning", "only-train-once", "kfac-ext")


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        task, target, method: names.
        value: of the method's knob.
        seed: of all streams.
        validation: tested on a fifth of the training images, to choose the knob.
    """

    task: str
    target: str
    method: str
    value: float | str
    seed: int
    validation: bool = False

    @property
    def key(self) -> str:
        """Its file's name, without the ending."""
        kind = "tuning" if self.validation else "test"
        return f"{self.task}-{self.target}-{self.method}-{self.value}-{kind}-{self.seed}"


def runs_of(
    task: str, target: str, name: str, method: type[Method], value: float | str, seeds: Sequence[int], *, tuning: bool
) -> list[Run]:
    """The runs of a setting."""
    return [Run(task, target if method.prunes else WHOLE, name, value, seed, tuning) for seed in seeds]


class Folder:
    """Runs that ended.

    Args:
        path: of the folder; made if it is not there.
        stamp: what all runs of a folder have in common; None reads a folder whatever it was made with.

    Raises:
        InputError: the folder was made with other code, settings or data; the message names what differs.
    """

    def __init__(self, path: Path, stamp: dict[str, Any] | None) -> None:
        self.path = path
        file = path / STAMP
        if stamp is None and not file.is_file():
            raise InputError(f"{path}: no study is in this folder")
        path.mkdir(parents=True, exist_ok=True)
        self.stamp: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
        if stamp is not None:
            here = json.loads(json.dumps(stamp))  # as it is read again
            if self.stamp:
                _refuse_others(path, self.stamp, here)
            self.stamp = {**here, **self.stamp, "data": {**self.stamp.get("data", {}), **here["data"]}}
            write_atomically(file, json.dumps(self.stamp, indent=1) + "\n")

    def file(self, run: Run) -> Path:
        """Where the outcome of a run is or will be."""
        return self.path / f"{run.key}.json"

    def network(self, run: Run) -> Path:
        """Where the tensors of its final network are or will be."""
        return self.path / f"{run.key}.pt"

    def outcome(self, run: Run) -> dict[str, Any] | None:
        """What a run gave, None if it has not ended."""
        file = self.file(run)
        return json.loads(file.read_text()) if file.is_file() else None

    def keep(self, run: Run, outcome: dict[str, Any]) -> None:
        """Write the outcome of a run, whole or not at all."""
        write_atomically(self.file(run), json.dumps({**asdict(run), **outcome}, indent=1) + "\n")

    def best_value(self, task: str, target: str, name: str, method: type[Method], seeds: Sequence[int]) -> Any:
        """The value of the knob with the highest mean accuracy on the held-out images; None while any run is missing.

        A run that diverged or failed counts as accuracy 0; of equal values the recommended one wins.
        """
        sums = []
        for value in method.knob.values:
            runs = runs_of(task, target, name, method, value, seeds, tuning=True)
            found = [self.outcome(run) for run in runs]
            if any(outcome is None for outcome in found):
                return None
            sums.append(sum(outcome.get("accuracy", 0.0) for outcome in found if outcome is not None))
        return method.knob.values[sums.index(max(sums))]


def _refuse_others(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    for key in ("code", "settings", "versions", "cpu", "data"):
        old, new = there.get(key, {}), here[key]
        if key == "data":  # of other tasks
            old, new = ({name: of[name] for name in old.keys() & new.keys()} for of in (old, new))
        if old != new:
            raise InputError(
                f"{path}: was made with other {key}: {_brief(old, new)}, here {_brief(new, old)}; use another folder"
            )


def _brief(value: Any, other: Any) -> str:
    if isinstance(value, dict) and isinstance(other, dict):
        value = {key: entry for key, entry in value.items() if other.get(key) != entry}
    text = json.dumps(value)
    return text if len(text) < 80 else text[:77] + "..."


def stamp(data_dir: Path, tasks: Sequence[str]) -> dict[str, Any]:
    """What the runs of a folder have in common: code, settings, versions, machine, and the images of the tasks."""
    return {
        "code": code_digest(),
        "commit": commit(),
        "settings": settings(),
        "versions": {name: version(name) for name in DISTRIBUTIONS} | {"torch": torch.__version__},
        "cpu": cpu_name(),
        "data": {file: _file_digest(data_dir / file) for file in sorted({TASKS[name].file for name in tasks})},
    }


def settings() -> dict[str, Any]:
    """Tasks, targets and methods."""
    methods = {name: method.settings() for name, method in all_methods().items()}
    return {"tasks": {name: asdict(task) for name, task in TASKS.items()}, "targets": TARGETS, "methods": methods}


def code_digest(root: Path = ROOT) -> str:
    """Of the sources that decide about figures."""
    digest = hashlib.sha256()
    for path in _sources(root):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _sources(root: Path) -> Iterator[Path]:
    for folder in SOURCES:
        for path in sorted((root / folder).rglob("*.py")):
            if folder != "bench/rivals" or path.name not in _OTHERS:
                yield path


def _file_digest(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def task_of(run: Run) -> Task:
    """The task of a run."""
    return TASKS[run.task]
