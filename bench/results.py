"""The JSON of a run: what machine, which versions, which commit, and one entry a case, written after each case."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import kfac_ext
from bench.timing import load_average

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
FORMAT = 1
PEERS = {  # import name -> distribution
    "asdl": "asdfghjkl",
    "curvlinops": "curvlinops-for-pytorch",
    "nngeometry": "nngeometry",
    "backpack": "backpack-for-pytorch",
    "singd": "singd",
}
Case = dict[str, Any]


def cpu_name() -> str:
    """The processor as the system names it."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the working tree, with '+changes' if tracked sources differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        paths = ["bench/*.py", "csrc", "kfac_ext", "python"]
        return git("rev-parse", "--short=10", "HEAD") + ("+changes" if git("status", "-s", "-uno", *paths) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def version(distribution: str) -> str | None:
    """Its installed version, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _rate(run: Any, work: float) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return work / min(times)


def measured_rates() -> dict[str, float]:
    """What this machine reaches now: float32 matmul in GFLOP/s and copying in GB/s (read + written)."""
    a = torch.randn(1024, 1024)
    source, target = torch.randn(2**24), torch.empty(2**24)
    return {
        "matmul_gflops": round(_rate(lambda: a @ a, 2 * 1024**3) / 1e9, 1),
        "copy_gbs": round(_rate(lambda: target.copy_(source), 2 * source.nbytes) / 1e9, 1),
    }


def machine() -> dict[str, Any]:
    """The machine and the versions, without anything that changes from run to run."""
    info = kfac_ext.build_info()
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": info["simd"],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kfac_ext": kfac_ext.__version__,
        "peers": {name: version(distribution) for name, distribution in PEERS.items()},
    }


def machine_slug() -> str:
    """The processor's name and the instruction set in use, in a file's name."""
    name = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")
    return f"{name}-{kfac_ext.build_info()['simd']}"


def default_path(quick: bool) -> Path:
    """bench/results/<cpu>-<simd>-<threads>t[-quick].json."""
    return RESULTS / f"{machine_slug()}-{torch.get_num_threads()}t{'-quick' if quick else ''}.json"


class Results:
    """The document of a run; every `add` writes it whole, so that an interrupted run keeps what it has.

    Args:
        path: where it lies.
        quick: short runs; their numbers are rougher.
        fresh: forget what is there; else cases measured again replace the old ones of a file from the same machine.
    """

    def __init__(self, path: Path, *, quick: bool, fresh: bool) -> None:
        self.path = path
        here = machine()
        self.document: dict[str, Any] = {"format": FORMAT, "quick": quick, "machine": here, "cases": []}
        if not fresh and path.exists():
            old = json.loads(path.read_text())
            if (old.get("format"), old["quick"], old["machine"]) == (FORMAT, quick, here):
                self.document = old
        self.document |= {"started": time.strftime("%Y-%m-%d %H:%M:%S"), "finished": None}
        self.document["rates_before"] = measured_rates()
        self._commit = commit()

    @property
    def cases(self) -> list[Case]:
        """The entries, in the order in which they were first measured."""
        return self.document["cases"]

    def add(self, case: Case) -> None:
        """Add or replace the case of this suite and name, and write the file."""
        case = {**case, "commit": self._commit, "load": load_average(), "threads": torch.get_num_threads()}
        keys = [(c["suite"], c["name"]) for c in self.cases]
        key = (case["suite"], case["name"])
        if key in keys:
            self.cases[keys.index(key)] = case
        else:
            self.cases.append(case)
        self.write()

    def finish(self) -> None:
        """Note that nothing is missing at the end."""
        self.document |= {"finished": time.strftime("%Y-%m-%d %H:%M:%S"), "rates_after": measured_rates()}
        self.write()

    def write(self) -> None:
        """Replace the file at once: a reader never sees half of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".tmp")
        partial.write_text(json.dumps(_rounded(self.document), indent=1) + "\n")
        partial.replace(self.path)


def _rounded(value: Any) -> Any:
    """Numbers with four digits: more would only make the file longer."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value


def load(path: str | Path) -> dict[str, Any]:
    """A document written by `Results`; ValueError if it is none."""
    document = json.loads(Path(path).read_text())
    if not _is_of_suite(document):
        raise ValueError(f"{path}: not a result of this benchmark suite (format {FORMAT})")
    return document


def of_suite(folder: Path) -> dict[Path, dict[str, Any]]:
    """The documents of `Results` in a folder; other benchmarks keep theirs beside them."""
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
