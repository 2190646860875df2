"""A run of `bench.gpu`: its clock, its commands, and the JSON that grows with it."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).parents[2]
FORMAT = 2
Work = TypeVar("Work")
SHORTEST = 5.0  # seconds that a command may take, however late it is
LIMITS = {"build": 180, "tests": 110, "bench": 150, "training": 60, "sanitizer": 120}  # seconds


class Run:
    """The JSON under way; written after every step, so that a run that is cut short keeps what it has."""

    def __init__(self, path: Path, minutes: float, limits: Mapping[str, float] = LIMITS) -> None:
        self._limits = limits
        self.path, self.end = path, time.monotonic() + 60 * minutes
        self.step_end = self.end
        self.document: dict[str, Any] = {
            "format": FORMAT,
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            "left_out": [],
        }

    def begin(self, step: str) -> None:
        """Start the clock of a step."""
        self.step_end = min(self.end, time.monotonic() + self._limits.get(step, math.inf))

    def seconds_left(self) -> float:
        """Until the step has to end."""
        return self.step_end - time.monotonic()

    def turns(self, work: Mapping[str, Work]) -> Iterator[tuple[str, Work, float]]:
        """(label, work, its fair fraction of the seconds left) of all that there is time for; the rest is left out."""
        for place, (label, item) in enumerate(work.items()):
            left = self.seconds_left()
            if left < SHORTEST:
                self.document["left_out"].append(label)
                continue
            print(f"[{left:4.0f} s left] {label}", flush=True)
            yield label, item, left / (len(work) - place)

    def failed(self, label: str, error: RuntimeError) -> None:
        """Note what did not work (out of memory, say); the rest is still of use."""
        self.document.setdefault("failed", []).append(f"{label}: {str(error).splitlines()[0]}")

    def keep(self, key: str, value: Any) -> None:
        """Store a step's outcome."""
        self.document[key] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.document, indent=1) + "\n")

    def command(self, name: str, *words: str, **environment: str) -> dict[str, Any]:
        """Run a command; its exit code, seconds and the end of its output. A timeout is exit code 124."""
        print(f"[{self.seconds_left():4.0f} s left] {name}", flush=True)
        start = time.monotonic()
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=max(SHORTEST, self.seconds_left()))
            code = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            output, code = process.communicate()[0], 124
        if code:
            print(output[-3000:], flush=True)
        return {"exit": code, "seconds": round(time.monotonic() - start, 1), "output": output[-3000:]}
