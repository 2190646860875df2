"""Data files from anywhere: one line, little memory, no code."""

from __future__ import annotations

import io
import os
import pickle
import resource
import zipfile

import numpy as np
import pytest

from flatprune.errors import InputError
from flatprune.files.npz import read_npz

KEYS = ("x", "y")


def npy(array):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def header(shape, dtype="'|u1'"):
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}}}"
    length = -(-(10 + len(text) + 1) // 64) * 64 - 10
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + text.ljust(length - 1).encode() + b"\n"


@pytest.fixture
def npz(tmp_path):
    def write(x, *more):
        path = tmp_path / "data.npz"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in (("x.npy", x), ("y.npy", npy(np.arange(3))), *more):
                archive.writestr(name, content)
        return str(path)

    return write


def test_arrays_come_back(npz):
    arrays = read_npz(npz(npy(np.eye(2)), ("z.npy", b"not looked at")), KEYS)
    assert arrays["x"].tolist() == [[1, 0], [0, 1]] and arrays["y"].tolist() == [0, 1, 2]


class Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (header("(10**13,)".replace("10**13", str(10**13))), "its header says"),
        (header("(-1,)"), "cannot be read"),
        (header("(2, 2)") + b"123", "its header says"),
        (header("(2, 2)") + b"12345", "its header says"),
        (header("(" + "9" * 5000 + ",)"), "cannot be read"),
        (header("(" * 4000), "cannot be read"),
        (header("(1,)", "'|O'") + b"x" * 8, "Python objects"),
        (b"", "cannot be read"),
        (b"\x93NUMPY\x09\x00" + b"x" * 100, "version"),
        (b"\x93NUMPY\x01\x00\xff\xff", "cannot be read"),
    ],
    ids=["10 TB", "negative", "short", "long", "digits", "deep", "objects", "empty", "version", "no header"],
)
def test_hostile_arrays(npz, content, words):
    with pytest.raises(InputError, match=words) as error:
        read_npz(npz(content), KEYS)
    assert "data.npz" in str(error.value) and "\n" not in str(error.value)


def test_objects_are_not_unpickled(npz, tmp_path):
    path = npz(header("(1,)", "'|O'") + pickle.dumps(np.array([Payload(tmp_path / "ran")], object)))
    with pytest.raises(InputError, match="could run code"):
        read_npz(path, KEYS)
    assert not (tmp_path / "ran").exists()


def test_a_bomb_is_not_unpacked(npz):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = npz(header("(100000000,)") + bytes(100_000_000))
    with pytest.raises(InputError, match="bytes that unpack to 100,000,"):
        read_npz(path, KEYS)
    assert os.path.getsize(path) < 200_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # what made it, in kB


def test_more_than_the_memory_is_refused(npz, monkeypatch):
    monkeypatch.setattr("flatprune.files.npz._memory", lambda: 1000)
    with pytest.raises(InputError, match="more than the memory"):
        read_npz(npz(npy(np.zeros(1000))), KEYS)


def test_a_flipped_bit_in_an_array_is_found(npz):
    path = npz(npy(np.arange(100_000) % 251))
    with open(path, "r+b") as file:
        file.seek(500)
        byte = file.read(1)[0]
        file.seek(500)
        file.write(bytes([byte ^ 4]))
    with pytest.raises(InputError, match=r"data\.npz"):
        read_npz(path, KEYS)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    for name, words in (("pipe.npz", "no ordinary file"), ("none.npz", "no such file"), ("a\0b", "no such file")):
        with pytest.raises(InputError, match=words):
            read_npz(str(tmp_path / name), KEYS)


def test_an_array_that_is_there_twice(npz):
    with pytest.warns(UserWarning, match="Duplicate"):
        path = npz(npy(np.eye(2)), ("x.npy", npy(np.eye(3))))
    with pytest.raises(InputError, match="2 arrays 'x'"):
        read_npz(path, KEYS)
