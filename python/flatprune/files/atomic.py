"""Files that are either the old ones or the new ones, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from flatprune.errors import DamagedError, InputError

DAMAGED_SUFFIX = ".damaged"
TEMPORARY_SUFFIX = ".tmp"


def write_atomically(path: str | os.PathLike[str], content: bytes | bytearray | memoryview | str) -> None:
    """Replace the file at `path` by `content`, or leave it as it was.

    Writes `path` + ".tmp" in the same folder, flushes it to the disk, renames it over `path`, and flushes the folder,
    so that a full disk, a killed process or a power cut leaves the old file or the new one, never half of one. Text is
    UTF-8; what UTF-8 cannot hold (a file's name of other bytes) is written as an escape.

    Raises:
        OSError: the file could not be written; the old one is untouched and the temporary file is removed.
    """
    path = Path(path)
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)  # one name: a killed process leaves at most one behind
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            reason = f"cannot be saved ({error.strerror}); what was there before is kept"
            raise OSError(error.errno, reason, str(path)) from error
        raise
    sync(path.parent)


def sync(path: str | os.PathLike[str]) -> None:
    """Flush a file, or the names in a folder, to the disk where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_bytes(path: str | os.PathLike[str], limit: int | None = None) -> bytes:
    """The content of a file.

    Args:
        path: of an ordinary file.
        limit: bytes that it may have at most.

    Raises:
        InputError: there is no such file, it cannot be read, or is larger; in one line that names it.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            content = file.read() if limit is None else file.read(limit + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if limit is not None and len(content) > limit:
        raise InputError(f"{path}: is larger than {limit:,} bytes")
    return content


def sha256(content: bytes | bytearray | memoryview) -> str:
    """The digest of some bytes, in 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def put_aside(path: Path) -> Path:
    """Give a damaged file the name `path` + ".damaged", in the place of one that was put aside before."""
    aside = path.with_name(path.name + DAMAGED_SUFFIX)
    os.replace(path, aside)
    sync(path.parent)
    return aside


def damaged(path: str | os.PathLike[str], reason: object) -> DamagedError:
    """The error for a file that is not what was written."""
    lines = str(reason).splitlines() or [type(reason).__name__]
    return DamagedError(f"{path}: is damaged, cannot be read ({lines[0].strip()})")
