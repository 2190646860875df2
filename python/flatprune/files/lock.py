"""The lock of a folder, which only a living process can hold: the system lets go of it however the process ends."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from flatprune.errors import InputError

LOCK_FILE = "lock"
HOLDER_FILE = "lock.holder"


class FolderLock:
    """One process at a time works in a folder.

    The lock is `flock` on the file `lock` (which NFS carries to other hosts, where it is mounted so), or filelock's
    marker file where the file system has no `flock`. `lock.holder` names the process and the host.

    Args:
        folder: exists.
        wait: wait for the other process instead of refusing.

    Raises:
        InputError: another process holds it, which is named as far as it is known.
    """

    def __init__(self, folder: Path, *, wait: bool = False) -> None:
        self.folder = folder
        self._acquire(wait)

    def _acquire(self, wait: bool) -> None:
        path = self.folder / LOCK_FILE
        self._lock = FileLock(path)
        try:
            self._lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            raise InputError(f"{self.folder}: in use by {_holder(self.folder)}; wait for it, or end it") from None
        self._identity = _identity(path)
        (self.folder / HOLDER_FILE).write_text(f"process {os.getpid()} on {socket.gethostname()}\n")

    def hold(self) -> None:
        """Make the folder and its lock again where somebody has removed them meanwhile.

        Raises:
            InputError: another process works in the new folder.
            OSError: the folder cannot be made.
        """
        if _identity(self.folder / LOCK_FILE) == self._identity:
            return
        self._lock.release(force=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._acquire(wait=False)

    def release(self) -> None:
        """Let go."""
        if _identity(self.folder / LOCK_FILE) == self._identity:
            with contextlib.suppress(OSError):
                (self.folder / HOLDER_FILE).unlink(missing_ok=True)
        self._lock.release(force=True)


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[FolderLock]:
    """Hold the lock of a folder; arguments and errors are those of `FolderLock`."""
    lock = FolderLock(folder, wait=wait)
    try:
        yield lock
    finally:
        lock.release()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _holder(folder: Path) -> str:
    try:
        return (folder / HOLDER_FILE).read_text(errors="replace").strip()[:200] or "another process"
    except OSError:
        return "another process"
