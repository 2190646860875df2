"""The lock of a folder, which only a living process can hold: the system lets go of it however the process ends."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from flatprune.errors import InputError

LOCK_FILE = "lock"
HOLDER_FILE = "lock.holder"


class FolderLock:
    """One process at a time works in a folder, and in those of the folders in it that are taken too.

    The lock is `flock` on the file `lock` (which NFS carries to other hosts, where it is mounted so), or filelock's
    marker file where the file system has no `flock`. `lock.holder` names the process and the host, where the disk has
    room for it.

    Args:
        folder: exists.
        wait: wait for the other process instead of refusing.

    Raises:
        InputError: another process holds it, which is named as far as it is known.
    """

    def __init__(self, folder: Path, *, wait: bool = False) -> None:
        self.folder = folder
        self._held = {folder: _Held(folder, wait)}

    def take(self, inside: Iterable[str], *, wait: bool = False) -> None:
        """Make folders in this one, and hold their locks as long as this one's.

        Raises:
            InputError: another process holds one of them.
            OSError: a folder cannot be made.
        """
        for folder in (self.folder / name for name in inside):
            if folder not in self._held:
                folder.mkdir(exist_ok=True)
                self._held[folder] = _Held(folder, wait)

    def hold(self) -> None:
        """Make the folders and their locks again where somebody has removed them meanwhile.

        Raises:
            InputError: another process works in the new folder.
            OSError: the folder cannot be made.
        """
        for folder, held in self._held.items():
            if held.is_gone():
                held.lock.release(force=True)
                folder.mkdir(parents=True, exist_ok=True)
                self._held[folder] = _Held(folder, wait=False)

    def release(self) -> None:
        """Let go."""
        for held in self._held.values():
            held.release()


class _Held:
    """The lock of one folder, acquired; arguments and errors are those of `FolderLock`."""

    def __init__(self, folder: Path, wait: bool) -> None:
        self.folder, self.lock = folder, FileLock(folder / LOCK_FILE)
        try:
            self.lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            raise InputError(f"{folder}: in use by {_holder(folder)}; wait for it, or end it") from None
        self._identity = _identity(folder / LOCK_FILE)
        with contextlib.suppress(OSError):  # of a full disk: it is only there to be read by people
            (folder / HOLDER_FILE).write_text(f"process {os.getpid()} on {socket.gethostname()}\n")

    def is_gone(self) -> bool:
        """Whether the file that is locked is no longer that of the folder."""
        return _identity(self.folder / LOCK_FILE) != self._identity

    def release(self) -> None:
        """Let go; the holder's name goes with the lock, unless it is another's."""
        if not self.is_gone():
            with contextlib.suppress(OSError):
                (self.folder / HOLDER_FILE).unlink(missing_ok=True)
        self.lock.release(force=True)


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
