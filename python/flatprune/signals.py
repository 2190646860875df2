"""Signals that ask a process to end, as a flag that is looked at between two steps."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU)
_UNLESS_IGNORED = (signal.SIGHUP, signal.SIGXCPU)  # as under nohup: somebody wants the run to go on


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn the first signal that asks to end into a flag, so that the step in hand is finished.

    They are SIGINT, SIGTERM, SIGHUP (the terminal is gone) and SIGXCPU (the process has used its time). Further ones
    change nothing, but for a second SIGINT, which is abrupt.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(number)

    ignored = [number for number in _UNLESS_IGNORED if signal.getsignal(number) == signal.SIG_IGN]
    try:
        previous = {number: signal.signal(number, note) for number in _STOPPING if number not in ignored}
    except ValueError:  # not in the main thread: signals are the caller's business
        yield lambda: False
        return
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
