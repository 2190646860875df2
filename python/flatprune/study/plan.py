"""Which runs a study needs, which of them are there, and what each cell of the grid came to.

A run is known by the digest of its settings and of the content of its data, and lies in `runs/DIGEST`: cells of equal
settings share one, and a run that is there is not made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.cluster.hierarchy import DisjointSet

from flatprune.data import content_files
from flatprune.errors import DamagedError, InputError
from flatprune.execution import FAILED
from flatprune.files.atomic import read_bytes
from flatprune.files.finished import DIGESTS_FILE, HISTORY_FILE, SUMMARY_FILE, check_digest, read_summary
from flatprune.files.records import Kind, read_record, write_record
from flatprune.runs.folder import CHECKPOINT_FILE
from flatprune.settings import Settings
from flatprune.study.grid import Candidate, Cell, Study

RUNS_FOLDER = "runs"
FAILURE_FILE = "failure.json"
DATA_FILE = "data.json"
DATA = Kind("flatprune-study-data", 1)
FAILURE = Kind("flatprune-failure", 1)
DAMAGED = "damaged"
JUDGED_BY = "test_accuracy_last"  # of a tuning run, whose test images are held-out training images
_FREE = ("device", "threads")  # where a run is made is not part of what it is
_DIGITS = 16
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        summary: content of its `summary.json`; None if it did not end.
        kind: "" for a finished run, else DIVERGED (as it will again), FAILED, or DAMAGED: it was finished, but its
            files are not what was written.
        message: why it did not end.
    """

    summary: dict[str, Any] | None
    kind: str = ""
    message: str = ""


@dataclass(frozen=True)
class Resolved:
    """What a cell is to run, once all that it depends on is known.

    Attributes:
        settings: None where it cannot be run, since what it depends on did not end.
        chosen: label of the candidate that tuning chose, else "".
        message: why it cannot be run.
    """

    settings: Settings | None
    chosen: str = ""
    message: str = ""


class Plan:
    """The runs of a study in a folder.

    Args:
        study: what is wanted.
        folder: of the study.
        data_ids: digests of the data, by the name in the settings.
        retry: count runs that failed before (other than by diverging) as still to be made.
        restart_damaged: count runs that are damaged as still to be made.
        shard: (i, n): the i-th of n parts is to be made here, which needs nothing of the others.
    """

    def __init__(
        self,
        study: Study,
        folder: Path,
        data_ids: dict[str, str],
        *,
        retry: bool = True,
        restart_damaged: bool = False,
        shard: tuple[int, int] = (1, 1),
    ) -> None:
        self.study, self.folder, self._data_ids, self._retry = study, folder, data_ids, retry
        self.restart_damaged = restart_damaged
        self._keys: dict[Settings, str] = {}
        self._outcomes: dict[str, Outcome] = {}
        self._resolved: dict[Cell, Resolved] = {}
        self._by_place = {(cell.variant, cell.point, cell.seed): cell for cell in study.cells}
        self.own_cells = study.cells if shard == (1, 1) else self._shard(*shard)

    def key(self, settings: Settings) -> str:
        """The digest that a run is known by."""
        if settings not in self._keys:
            self._keys[settings] = self._digest(settings)
        return self._keys[settings]

    def _digest(self, settings: Settings) -> str:
        values = {name: value for name, value in settings.as_dict().items() if name not in _FREE}
        values["data"] = self._data_ids[settings.data]
        if settings.architecture_of is not None:
            values["architecture_of"] = Path(settings.architecture_of).name
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:_DIGITS]

    def folder_of(self, key: str) -> Path:
        """Where the run of this key lies."""
        return self.folder / RUNS_FOLDER / key

    def outcome(self, key: str) -> Outcome | None:
        """What became of a run; None if it is still to be made."""
        if key not in self._outcomes:
            found = _read_outcome(self.folder_of(key))
            if found is None or (self._retry and found.kind == FAILED):
                return None
            if self.restart_damaged and found.kind == DAMAGED:
                return None
            self._outcomes[key] = found
        return self._outcomes[key]

    def record(self, key: str, outcome: Outcome) -> None:
        """Keep what became of a run that was made now; where it did not end, also on the disk."""
        self._outcomes[key] = outcome
        if outcome.summary is None:
            write_record(
                self.folder_of(key) / FAILURE_FILE, FAILURE, {"kind": outcome.kind, "message": outcome.message}
            )

    def final(self, cell: Cell) -> Outcome | None:
        """What a cell came to; None as long as it is not known."""
        resolved = self.resolve(cell)
        if resolved is None:
            return None
        if resolved.settings is None:
            return Outcome(None, FAILED, resolved.message)
        return self.outcome(self.key(resolved.settings))

    def failures(self, *kinds: str) -> dict[str, str]:
        """Name -> reason of the cells that came to an outcome of these kinds."""
        ends = {cell.name: self.final(cell) for cell in self.own_cells}
        return {name: end.message for name, end in ends.items() if end is not None and end.kind in kinds}

    def resolve(self, cell: Cell) -> Resolved | None:
        """What a cell is to run; None as long as that depends on runs to come."""
        if cell not in self._resolved:
            resolved = self._chosen(cell)
            if resolved is not None and resolved.settings is not None and cell.scratch_of is not None:
                resolved = self._with_architecture(cell, resolved)
            if resolved is None:
                return None
            self._resolved[cell] = resolved
        return self._resolved[cell]

    def wanted(self) -> Iterator[tuple[str, str, Settings]]:
        """(key, name, settings) of the runs that can be made now, each once."""
        seen = set()
        for cell in self.own_cells:
            for name, settings in self._next(cell):
                key = self.key(settings)
                if key not in seen and self.outcome(key) is None:
                    seen.add(key)
                    yield key, name, settings

    def _next(self, cell: Cell) -> Iterator[tuple[str, Settings]]:
        for candidate in cell.candidates:
            yield from ((f"{_place(cell)}, tuning {candidate.label}", settings) for settings in candidate.runs)
        resolved = self.resolve(cell)
        if resolved is not None and resolved.settings is not None:
            yield cell.name, resolved.settings

    def counts(self) -> tuple[int, int]:
        """Runs that are made and runs altogether, those counted singly that depend on others."""
        keys: set[str] = set()
        unknown = 0
        for cell in self.own_cells:
            keys.update(self.key(settings) for _, settings in self._next(cell))
            unknown += self.resolve(cell) is None
        done = sum(self.outcome(key) is not None for key in keys)
        return done, len(keys) + unknown

    def unmade(self) -> Iterator[Settings]:
        """Settings of all runs that are still to be made, as far as they are known."""
        yield from (settings for _, _, settings in self.wanted())
        yield from (cell.settings for cell in self.own_cells if self.resolve(cell) is None)

    def _shard(self, number: int, total: int) -> tuple[Cell, ...]:
        """Every total-th set of cells that share runs, or need another's, from the one of this number on."""
        together = DisjointSet(self.study.cells)
        for cell in self.study.cells:
            for link in self._links(cell):
                together.add(link)
                together.merge(cell, link)
        own = set().union(*together.subsets()[number - 1 :: total])
        return tuple(cell for cell in self.study.cells if cell in own)

    def _links(self, cell: Cell) -> Iterator[Any]:
        """What a cell has in common with others: runs, and the cell that it takes its architecture from."""
        yield from (self.key(settings) for candidate in cell.candidates for settings in candidate.runs)
        if cell.scratch_of is None and not cell.candidates:
            yield self.key(cell.settings)
        if cell.scratch_of is not None:
            yield self._by_place.get((cell.scratch_of, cell.point, cell.seed))

    def _chosen(self, cell: Cell) -> Resolved | None:
        """The settings of a cell after tuning."""
        if not cell.candidates:
            return Resolved(cell.settings)
        scores = [self._score(candidate) for candidate in cell.candidates]
        if None in scores:
            return None
        best = max(range(len(scores)), key=lambda i: (scores[i] or 0.0, -i))
        if not scores[best]:
            return Resolved(None, "", "no candidate of the tuning came to an end")
        candidate = cell.candidates[best]
        return Resolved(cell.settings.changed(**dict(candidate.values)), candidate.label)

    def _score(self, candidate: Candidate) -> float | None:
        """Mean accuracy on held-out images; 0 if a run of it did not end, None if one is still to come."""
        outcomes = [self.outcome(self.key(settings)) for settings in candidate.runs]
        if any(outcome is None for outcome in outcomes):
            return None
        summaries = [outcome.summary for outcome in outcomes if outcome is not None and outcome.summary is not None]
        if len(summaries) < len(outcomes):
            return 0.0
        return statistics.fmean(summary[JUDGED_BY] for summary in summaries)

    def _with_architecture(self, cell: Cell, resolved: Resolved) -> Resolved | None:
        source = self._by_place.get((cell.scratch_of or "", cell.point, cell.seed))
        if source is None:
            raise InputError(f"{self.study.path}: {cell.name}: {cell.scratch_of!r} is not run at this point")
        outcome = self.final(source)
        if outcome is None:
            return None
        if outcome.summary is None:
            return Resolved(None, "", f"{source.name} did not end")
        taken = self.resolve(source)
        assert taken is not None and taken.settings is not None and resolved.settings is not None
        folder = self.folder_of(self.key(taken.settings))
        return Resolved(resolved.settings.changed(architecture_of=str(folder), widths=None), resolved.chosen)


def _place(cell: Cell) -> str:
    return ", ".join([cell.variant, *(f"{axis} {value}" for axis, value in cell.point)])


def _read_outcome(folder: Path) -> Outcome | None:
    if (folder / SUMMARY_FILE).is_file():
        try:
            summary = read_summary(folder)
            check_digest(folder, HISTORY_FILE, read_bytes(folder / HISTORY_FILE))
        except InputError as error:
            return Outcome(None, DAMAGED, f"{error}; --restart-damaged makes the run anew")
        return Outcome(summary)
    if (folder / DIGESTS_FILE).is_file() and not (folder / CHECKPOINT_FILE).is_file():  # it was finished
        return Outcome(None, DAMAGED, f"{folder / SUMMARY_FILE}: is missing; --restart-damaged makes the run anew")
    if (folder / FAILURE_FILE).is_file():
        try:
            failure = read_record(folder / FAILURE_FILE, FAILURE)
        except DamagedError as error:
            return Outcome(None, FAILED, str(error))
        return Outcome(None, failure["kind"], failure["message"])
    return None


def data_id(data: str) -> str:
    """What names the content of a data set: "digits", the SHA-256 of the file or of all in the folder, "m:f" itself.

    Raises:
        InputError: there is no such file, or it cannot be read.
    """
    files = content_files(data)
    if not files:
        return data
    digest = hashlib.sha256()
    try:
        for path in files:
            if Path(data).is_dir():
                digest.update(os.fsencode(path.relative_to(data)))
            with open(path, "rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    return digest.hexdigest()
