"""Cases in forked children: what ends a child's process is found, and which case it was."""

import contextlib
import mmap
import os
import pickle
import signal
import struct
import time
import traceback
from collections.abc import Callable

import torch

from bench.hard.tally import Tally

Found = list[tuple[str, str]]
"""(a fault of the tally, what was seen) of one case; none where all is well"""

_BATCH = 250
_HUNG = 60  # seconds without a new case


def run_forked(
    family: str,
    case: Callable[[int, int], Found],
    cases: int,
    seed: int,
    seconds: float,
    batch: int = _BATCH,
    first: int = 0,
) -> Tally:
    """case(seed, index) for indices from `first` on; a child that dies or hangs is a crash of the case it was at."""
    tally, began, place = Tally(family, seed), time.monotonic(), first
    torch.set_num_threads(1)  # a process whose pool has threads cannot be forked
    while place < first + cases and time.monotonic() - began < seconds:
        end = min(place + batch, first + cases)
        done, found, death = _run_child(case, seed, place, end, began + seconds)
        for index, (kind, text) in found:
            tally.fault(kind, f"--seed {seed} --only {index}: {text}")
        place += done
        if death:
            tally.fault("crashed", f"--seed {seed} --only {place}: {death}")
            place += 1
        tally.tried += done + bool(death)
    tally.next, tally.seconds = place, time.monotonic() - began
    return tally


def _run_child(
    case: Callable[[int, int], Found], seed: int, first: int, end: int, limit: float
) -> tuple[int, list[tuple[int, tuple[str, str]]], str]:
    """How many cases were done, what was found, and how the child died if it did."""
    progress = mmap.mmap(-1, 16)  # cases begun, whether it ended in order
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _work(case, seed, range(first, end), limit, progress, writer)
    os.close(writer)
    status = _await(child, progress)
    with open(reader, "rb") as stream:
        found = _read_all(stream)
    begun, ended = struct.unpack("qq", progress)
    if ended:
        return begun, found, ""
    death = f"signal {signal.Signals(os.WTERMSIG(status)).name}" if os.WIFSIGNALED(status) else f"exit {status >> 8}"
    return (
        max(0, begun - 1),
        found,
        "hung" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL else death,
    )


def _work(
    case: Callable[[int, int], Found], seed: int, indices: range, limit: float, progress: mmap.mmap, writer: int
) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for place, index in enumerate(indices, 1):
        if time.monotonic() > limit:
            progress[:] = struct.pack("qq", place - 1, 1)
            os._exit(0)
        progress[:8] = struct.pack("q", place)
        try:
            found = case(seed, index)
        except Exception:  # of the case itself, not of what it tries
            found = [("wrong", f"the case fails: {traceback.format_exc(limit=-2)}")]
        for fault in found:
            os.write(writer, _framed(pickle.dumps((index, fault))))
    progress[8:] = struct.pack("q", 1)
    os._exit(0)


def _framed(data: bytes) -> bytes:
    return struct.pack("q", len(data)) + data


def _read_all(stream) -> list[tuple[int, tuple[str, str]]]:
    found = []
    while len(head := stream.read(8)) == 8:
        (size,) = struct.unpack("q", head)
        found.append(pickle.loads(stream.read(size)))
    return found


def _await(child: int, progress: mmap.mmap) -> int:
    """The child's wait status; it is killed where it begins no new case for long."""
    last, since = -1, time.monotonic()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        (now,) = struct.unpack("q", progress[:8])
        if now != last:
            last, since = now, time.monotonic()
        elif time.monotonic() - since > _HUNG:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1]
        time.sleep(0.005)
