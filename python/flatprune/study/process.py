"""A process that makes runs one after the other, so that only the first of them waits for it to start."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

from flatprune.training.ranks import alone

LOG_FILE = "log.txt"


class Worker:
    """`python -m flatprune.study.worker` seen from the study.

    Attributes:
        environment: that it was started with.
        first_step: where its run began, None before it has.
        step, total: how far its run is.
    """

    def __init__(self, environment: dict[str, str], folder: Path, *, restart_damaged: bool = False) -> None:
        """Start the process with the run in `folder`."""
        self.environment = environment
        self._restart_damaged = restart_damaged
        with open(folder / LOG_FILE, "w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "flatprune.study.worker"],
                stdin=subprocess.PIPE,  # closed by the system when this process ends, however it ends
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=alone(environment),
                start_new_session=True,  # Ctrl-C reaches the study alone, which stops its runs in good order
            )
        self.make(folder)
        threading.Thread(target=self._listen, daemon=True).start()

    def make(self, folder: Path) -> None:
        """Begin with the run in `folder`."""
        (folder / LOG_FILE).write_text("")
        self.first_step: int | None = None
        self.step = self.total = 0
        self._code: int | None = None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: `code` will tell
            order = [str(folder.absolute()), self._restart_damaged]
            print(json.dumps(order), file=self._process.stdin, flush=True)

    def can_make(self, environment: dict[str, str]) -> bool:
        """Whether it is there for another run, in this environment."""
        return self._process.poll() is None and self.environment == environment

    @property
    def code(self) -> int | None:
        """The exit code of its run, negative for a signal that ended the process; None as long as it goes on."""
        return self._process.poll() if self._code is None else self._code

    @property
    def steps_made(self) -> int:
        """Steps of its run that this process has made; others were there before."""
        return self.step - (self.first_step or 0)

    def stop(self) -> None:
        """Ask it to save a checkpoint and to end, also where its run has just come to its own end."""
        self._process.send_signal(signal.SIGTERM)
        self._close_input()

    def wait(self, seconds: float | None = None) -> None:
        """Until the process has ended.

        Raises:
            subprocess.TimeoutExpired: it goes on after so many seconds.
        """
        self._process.wait(seconds)

    def close(self, *, kill: bool = False) -> None:
        """End the process."""
        if kill:
            self._process.kill()
        self._close_input()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _close_input(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def _listen(self) -> None:
        """Follow what the worker tells: STEP TOTAL, or "ended" CODE."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            first, _, second = line.strip().partition(" ")
            if first == "ended":
                self._code = int(second)
            elif first.isdigit() and second.isdigit():
                self.step, self.total = int(first), int(second)
                self.first_step = self.step if self.first_step is None else self.first_step
