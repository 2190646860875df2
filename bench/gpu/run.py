"""A run on a GPU: steps, each a process with a limit and a log of its own, and the document that grows with them."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import time
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from bench.machine import ROOT
from bench.results import Document

TIMEOUT, MISSING = 124, 127  # exit codes: took too long, is no program
_SHORTEST = 5.0  # seconds: a step that would have less is left out
_LAST_WORDS = 3.0  # seconds that a process gets to write where it stands


class Step(NamedTuple):
    """A command that is run in a process of its own."""

    name: str
    words: tuple[str, ...]
    limit: float
    """seconds"""
    needs: tuple[str, ...] = ()
    """packages without which it is skipped"""
    writes: bool = False
    """takes `--out FILE` and writes its outcome there, as JSON, as often as it likes

    The `cases` in it become the document's.
    """
    environment: Mapping[str, str] = {}


def step_arguments(doc: str | None, networks: Collection[str]) -> argparse.Namespace:
    """What a step of one network is given: `network`, whether it is `dry`, where the JSON goes (`out`)."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=networks)
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


class Run(Document):
    """The document under way, in a folder with the logs of its steps; written anew after each of them.

    Attributes:
        document: beside the cases `steps`, name -> exit code, seconds, log, what it wrote; `left_out`, name -> why.
    """

    def __init__(self, folder: Path, name: str, minutes: float, *, quick: bool = False) -> None:
        super().__init__(folder / f"{name}.json", quick=quick)
        self.folder = folder
        self.end = time.monotonic() + 60 * minutes
        self.document |= {"steps": {}, "left_out": {}}

    def seconds_left(self) -> float:
        """Until the run has to end."""
        return self.end - time.monotonic()

    def steps(self, steps: Iterable[Step], at_once: int = 1) -> None:
        """Run these, in order, so many beside each other."""
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(self.step, steps))

    def step(self, step: Step) -> dict[str, Any] | None:
        """Run one; its outcome, or None where it is left out."""
        missing = [package for package in step.needs if importlib.util.find_spec(package) is None]
        limit = min(step.limit, self.seconds_left())
        if missing or limit < _SHORTEST:
            self._leave_out(step.name, f"{', '.join(missing)} not installed" if missing else "no time left")
            return None
        print(f"[{self.seconds_left():4.0f} s left] {step.name} ...", flush=True)
        file_name = "".join(letter if letter.isalnum() else "-" for letter in step.name)
        log, result = self.folder / "logs" / f"{file_name}.log", self.folder / "logs" / f"{file_name}.json"
        log.parent.mkdir(parents=True, exist_ok=True)
        result.unlink(missing_ok=True)
        words = (*step.words, "--out", str(result)) if step.writes else step.words
        start = time.monotonic()
        code = _execute(words, log, limit, step.environment)
        outcome = {
            "exit": code,
            "seconds": round(time.monotonic() - start, 1),
            "log": str(log.relative_to(self.folder)),
        }
        if result.exists():
            outcome["result"] = json.loads(result.read_text())
            for case in outcome["result"].pop("cases", []):
                self.add(case)
        self._end_of(step.name, outcome, log)
        return outcome

    def failed(self) -> list[str]:
        """Steps that did not end well."""
        return [name for name, outcome in self.document["steps"].items() if outcome["exit"]]

    def _leave_out(self, name: str, why: str) -> None:
        print(f"[{self.seconds_left():4.0f} s left] {name}: left out, {why}", flush=True)
        with self._lock:
            self.document["left_out"][name] = why
            self.write()

    def _end_of(self, name: str, outcome: dict[str, Any], log: Path) -> None:
        lines = log.read_text(errors="replace").splitlines()
        outcome["last"] = next((line.strip()[:200] for line in reversed(lines[1:]) if line.strip()), "")
        told = "\n".join(lines[-25:] if outcome["exit"] else lines[-1:])
        with self._lock:
            self.document["steps"][name] = outcome
            self.write()
            print(f"[{self.seconds_left():4.0f} s left] {name}: exit {outcome['exit']}, {outcome['seconds']} s\n{told}")


def _execute(words: tuple[str, ...], log: Path, limit: float, environment: Mapping[str, str]) -> int:
    """Run a command with its output in a file; the exit code."""
    paths = [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    common = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    with log.open("w") as output:
        print("$", *words, file=output, flush=True)
        try:
            process = subprocess.Popen(
                words,
                cwd=ROOT,
                env={**os.environ, **common, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            print(error, file=output)
            return MISSING
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            _end(process)
            print(f"ended after {limit:.0f} s", file=output)
            return TIMEOUT


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it has started; Python tells where it stood. One that hangs in a driver is left behind."""
    for last in (signal.SIGABRT, signal.SIGKILL):
        try:
            os.killpg(process.pid, last)
        except ProcessLookupError:
            return
        try:
            process.wait(_LAST_WORDS)
        except subprocess.TimeoutExpired:
            continue
