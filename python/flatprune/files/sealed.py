"""Zip files (`torch.save`, `torch.export.save`) that carry the SHA-256 of all their bytes as the comment at their end.

Neither torch's reader nor most others look at a zip's checksums, which do not cover its directory either. Any reader of
zip files skips the comment.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from typing import Any

import torch

from flatprune.errors import InputError
from flatprune.files.atomic import damaged, read_bytes, sha256, write_atomically

_MARK = b"sha256:"
_COMMENT = len(_MARK) + 64
_LENGTH = struct.pack("<H", _COMMENT)  # the last field before the comment
_END = b"PK\x05\x06"
_END_SIZE = 22


def seal(buffer: io.BytesIO) -> memoryview:
    """Append the digest to a zip file without a comment; returns all bytes."""
    end = buffer.getbuffer()[-_END_SIZE:]
    if bytes(end[:4]) != _END or bytes(end[-2:]) != b"\0\0":
        raise ValueError("not a zip file without a comment")
    end.release()
    buffer.seek(-2, io.SEEK_END)
    buffer.write(_LENGTH)
    buffer.write(_MARK + sha256(buffer.getbuffer()).encode())
    return buffer.getbuffer()


def seal_problem(data: bytes) -> str:
    """Why these are not the bytes that `seal` returned; empty if they are."""
    body, comment = data[:-_COMMENT], data[-_COMMENT:]
    if not comment.startswith(_MARK) or not body.endswith(_LENGTH):
        return "its end, which holds its SHA-256, is missing"
    return "" if comment == _MARK + sha256(body).encode() else "its bytes do not have the SHA-256 at its end"


def save_sealed(path: str | os.PathLike[str], state: Any) -> None:
    """`torch.save(state)`, sealed, through `write_atomically`.

    The bytes are made in memory first: `torch.save` into a file hides the reason when the disk is full.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, seal(buffer))


def load_sealed(path: str | os.PathLike[str], expected_format: str, version: int) -> dict[str, Any]:
    """Read a dict that `save_sealed` wrote and that carries this format and version; on the CPU; runs no code.

    Raises:
        InputError: there is no such file, it is of another format, or of another version, which is named.
        DamagedError: it is not what was written.
    """
    data = read_bytes(path)
    problem = seal_problem(data)
    if problem and (why := _zip_problem(data)):
        raise damaged(path, f"{problem}, {why}")
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds
        raise damaged(path, error) from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != expected_format:
        raise InputError(f"{path}: format is {found!r:.80}, expected {expected_format!r}")
    if state.get("version") != version:
        raise InputError(f"{path}: {found} version {state.get('version')!r:.80}, this package reads {version}")
    if problem:  # not a file of an earlier version: those had no seal
        raise damaged(path, problem)
    return state


def _zip_problem(data: bytes) -> str:
    """What the checksums of a zip file say of its members, which torch does not compress; empty if all are right."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                return "it has compressed members"
            bad = archive.testzip()
    except Exception as error:  # of many kinds
        return f"and it is no zip file: {error}"
    return f"and its member {bad!r} has another checksum" if bad else ""
