"""Arrays from an .npz file that may come from anywhere: looked at before memory is taken for it; no code is run.

An array may have as many bytes as its header says, no more than the machine has memory, no Python objects in it, and no
more than 300 times as many bytes as its compressed ones where it is larger than 64 MB.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from flatprune.errors import InputError

MAX_RATIO = 300
LARGE = 64 << 20  # bytes
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_npz(path: str, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of these names in an .npz file.

    Raises:
        InputError: one line that names the file, the array and what is wrong with it.
    """
    if "\0" in path or not Path(path).exists():
        hint = (
            "" if Path(path).suffix else " (`flatprune list data` names what there may be; by name alone only 'digits')"
        )
        raise InputError(f"{path}: no such file{hint}".replace("\0", "\\0"))
    if not Path(path).is_file():
        raise InputError(f"{path}: cannot be read (it is no ordinary file)")
    try:
        with zipfile.ZipFile(path) as archive:  # np.load takes other kinds of file too
            members = {key: _member(path, archive, key, keys) for key in keys}
            _check_sizes(path, members)
            return {key: _array(f"{path}: {key}", archive, member) for key, member in members.items()}
    except (InputError, KeyboardInterrupt):
        raise
    except zipfile.BadZipFile as error:
        raise InputError(f"{path}: not an .npz file, or a damaged one ({error})") from error
    except MemoryError as error:
        raise InputError(f"{path}: cannot be read (not enough memory)") from error
    except Exception as error:  # of many kinds, by what is damaged
        lines = str(error).splitlines() or [type(error).__name__]
        raise InputError(f"{path}: cannot be read ({lines[0]})") from error


def _member(path: str, archive: zipfile.ZipFile, key: str, keys: Sequence[str]) -> zipfile.ZipInfo:
    found = [member for member in archive.infolist() if member.filename == f"{key}.npy"]
    if not found:
        raise InputError(f"{path}: has no array {key!r}, expected {', '.join(keys)}")
    if len(found) > 1:
        raise InputError(f"{path}: has {len(found)} arrays {key!r}, expected one")
    return found[0]


def _check_sizes(path: str, members: dict[str, zipfile.ZipInfo]) -> None:
    """Refuse what the directory of the file claims, before anything is unpacked."""
    for key, member in members.items():
        if member.file_size > max(LARGE, MAX_RATIO * member.compress_size):
            raise InputError(
                f"{path}: {key} is {member.compress_size:,} bytes that unpack to {member.file_size:,}, expected "
                f"{MAX_RATIO} times as many at most"
            )
    total, memory = sum(member.file_size for member in members.values()), _memory()
    if total > memory:
        raise InputError(f"{path}: its arrays have {total:,} bytes, more than the memory of this machine ({memory:,})")


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _array(name: str, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as file:
        _check_header(name, file, member.file_size)
    with archive.open(member) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):  # to the end, where the checksum is compared
            raise InputError(f"{name}: has more bytes than its header says")
        return array


def _check_header(name: str, file: IO[bytes], size: int) -> None:
    """Refuse a header that does not tell of the bytes that are there."""
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise InputError(f"{name}: cannot be read (version {version} of the .npy format)")
    shape, _, dtype = _HEADERS[version](file)
    if dtype.hasobject:
        raise InputError(f"{name}: cannot be read (it holds Python objects, which could run code)")
    if any(side < 0 for side in shape) or file.tell() + math.prod(shape) * dtype.itemsize != size:
        raise InputError(
            f"{name}: cannot be read (its header says {shape} of {dtype}, it has {size - file.tell():,} bytes)"
        )
