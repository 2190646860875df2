"""A lock file that only a living process can hold: the system lets go of it when the process ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from flatprune.errors import InputError

LOCK_FILE = "lock"


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a folder.

    The file `lock` in it names the process that holds it. A file that a killed process left behind is no lock: the
    system's own lock on it has ended, so it is taken over.

    Args:
        folder: exists.
        wait: wait for the other process instead of refusing.

    Raises:
        InputError: another process holds it, named by its id.
    """
    path = folder / LOCK_FILE
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            owner = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            raise InputError(f"{folder}: in use by process {owner} ({path}); wait for it, or end it") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
