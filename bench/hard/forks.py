"""Cases in forks of one warm process: a crash, a kill or a hang costs one case, and none of them starts Python anew."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Ended(NamedTuple):
    """How a fork ended: what its function returned, or the signal that ended it, "hung" after its time."""

    value: Any = None
    signal: int = 0
    hung: bool = False


def forked(function: Callable[[], Any], seconds: float = 120.0, kill_after: float | None = None) -> Ended:
    """Call `function` in a fork.

    Args:
        function: returns what can be pickled; what it prints is dropped.
        seconds: after which it has hung.
        kill_after: SIGKILL after so many seconds, if it has not ended.
    """
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(source)
        _call(function, sink)
    os.close(sink)
    limit = seconds if kill_after is None else kill_after
    data, in_time = _read(source, time.monotonic() + limit)
    os.close(source)
    if not in_time:
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if not in_time and kill_after is None:
        return Ended(hung=True)
    if os.WIFSIGNALED(status):
        return Ended(signal=os.WTERMSIG(status))
    return Ended(pickle.loads(data))


def _call(function: Callable[[], Any], sink: int) -> None:
    """In the fork: never returns."""
    code = 1
    with contextlib.suppress(BaseException):
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        data = pickle.dumps(function())
        while data:
            data = data[os.write(sink, data) :]
        code = 0
    os._exit(code)


def _read(source: int, deadline: float) -> tuple[bytes, bool]:
    """All that comes until the other end is closed, and whether it was before the deadline."""
    found = b""
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([source], [], [], left)[0]:
            return found, False
        block = os.read(source, 1 << 16)
        if not block:
            return found, True
        found += block
