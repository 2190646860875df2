"""The JSON of a run: what machine, which versions, which commit, and one entry a case, written after each case.

Nothing here needs torch or what is built but the suite that pytest runs.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.documents import write_json
from bench.machine import ROOT, commit, copy_gbs, load_average, machine, machine_slug, matmul_gflops
from bench.timing import Variant, wall_and_cpu

RESULTS = ROOT / "bench" / "results"
FORMAT = 1
Case = dict[str, Any]


def measured_rates() -> dict[str, float]:
    """What this machine reaches now: float32 matmul in GFLOP/s and copying in GB/s (read + written)."""
    stopwatch = wall_and_cpu()

    def best(run: Variant) -> float:
        return min(stopwatch(run, 1)[0] for _ in range(5))

    return {"matmul_gflops": matmul_gflops(best), "copy_gbs": copy_gbs(best)}


def default_path(quick: bool) -> Path:
    """bench/results/<cpu>-<simd>-<threads>t[-quick].json."""
    import torch

    return RESULTS / f"{machine_slug()}-{torch.get_num_threads()}t{'-quick' if quick else ''}.json"


class Document:
    """The document of a run; whatever is added, it is written whole, so that an interrupted run keeps what it has.

    Threads may add to it.

    Args:
        path: where it lies.
        quick: short runs; their numbers are rougher.
    """

    def __init__(self, path: Path, *, quick: bool) -> None:
        self.path = path
        self.document: dict[str, Any] = {"format": FORMAT, "quick": quick, "machine": {}, "cases": []}
        self.document |= {"started": _now(), "finished": None}
        self._commit, self._lock = commit(), threading.RLock()

    @property
    def cases(self) -> list[Case]:
        """The entries, in the order in which they were first measured."""
        return self.document["cases"]

    def add(self, case: Case) -> None:
        """Add or replace the case of this suite and name, and write the file."""
        case = {"skipped": {}, **case, "commit": self._commit, "load": load_average()}
        key = (case["suite"], case["name"])
        with self._lock:
            keys = [(c["suite"], c["name"]) for c in self.cases]
            if key in keys:
                self.cases[keys.index(key)] = case
            else:
                self.cases.append(case)
            self.write()

    def keep(self, key: str, value: Any) -> None:
        """Store what is known beside the cases."""
        with self._lock:
            self.document[key] = value
            self.write()

    def finish(self) -> None:
        """Note when it ended."""
        self.keep("finished", _now())

    def write(self) -> None:
        """Replace the file at once: a reader never sees half of it."""
        write_json(self.path, _rounded(self.document))


class Results(Document):
    """The document of the suite that pytest runs, on this machine.

    Args:
        path, quick: see `Document`.
        fresh: forget what is there; else cases measured again replace the old ones of a file from the same machine.
    """

    def __init__(self, path: Path, *, quick: bool, fresh: bool) -> None:
        super().__init__(path, quick=quick)
        here = self.document["machine"] = machine()
        if not fresh and path.exists():
            old = json.loads(path.read_text())
            if (old.get("format"), old["quick"], old["machine"]) == (FORMAT, quick, here):
                self.document = old | {"started": self.document["started"], "finished": None}
        self.document["rates_before"] = measured_rates()

    def add(self, case: Case) -> None:
        """Add or replace the case of this suite and name, with the threads in use, and write the file."""
        import torch

        super().add({**case, "threads": torch.get_num_threads()})

    def finish(self) -> None:
        """Note that nothing is missing at the end."""
        self.document["rates_after"] = measured_rates()
        super().finish()


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _rounded(value: Any) -> Any:
    """Numbers with four digits: more would only make the file longer."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value


def load(path: str | Path) -> dict[str, Any]:
    """A document written by `Document`; ValueError if it is none."""
    document = json.loads(Path(path).read_text())
    if not _is_of_suite(document):
        raise ValueError(f"{path}: not a result of these benchmarks (format {FORMAT})")
    return document


def of_suite(folder: Path) -> dict[Path, dict[str, Any]]:
    """The documents of `Document` in a folder; other benchmarks keep theirs beside them."""
    found = {path: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return {path: document for path, document in found.items() if _is_of_suite(document)}


def _is_of_suite(document: Any) -> bool:
    return isinstance(document, dict) and document.get("format") == FORMAT


def by_key(document: Mapping[str, Any]) -> dict[tuple[str, str], Case]:
    """(suite, name) -> case."""
    return {(case["suite"], case["name"]): case for case in document["cases"]}


def commits(cases: Iterable[Case]) -> list[str]:
    """The commits the cases were measured at, in order."""
    return list(dict.fromkeys(case["commit"] for case in cases))
