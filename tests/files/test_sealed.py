"""Sealed zip files: every changed bit is found, and other readers still read them."""

from __future__ import annotations

import io
import random
import zipfile

import pytest
import torch

from flatprune.errors import DamagedError, InputError
from flatprune.files.sealed import load_sealed, save_sealed, seal, seal_problem

STATE = {"format": "test", "version": 3, "tensors": {"w": torch.arange(40.0)}, "name": "\udcff"}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "state.pt"
    save_sealed(path, STATE)
    return path


def test_reads_what_was_written_and_so_do_others(saved):
    for state in (load_sealed(saved, "test", 3), torch.load(saved, weights_only=True)):
        assert torch.equal(state["tensors"]["w"], STATE["tensors"]["w"]) and state["name"] == "\udcff"
    assert zipfile.ZipFile(saved).testzip() is None


def test_every_flipped_bit_is_found(saved):
    data = saved.read_bytes()
    rng = random.Random(0)
    places = {*rng.sample(range(len(data)), 300), *range(len(data) - 160, len(data)), *range(70)}
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << rng.randrange(8)
        assert seal_problem(bytes(changed)), place
    saved.write_bytes(bytes(changed))
    with pytest.raises(DamagedError, match=r"state.pt: is damaged"):
        load_sealed(saved, "test", 3)


@pytest.mark.parametrize("part", [0, 1, 500, -1, -73])
def test_a_part_is_not_the_whole(saved, part):
    saved.write_bytes(saved.read_bytes()[:part])
    with pytest.raises(DamagedError, match=r"state.pt: is damaged"):
        load_sealed(saved, "test", 3)


def test_another_version_is_refused_by_its_number(saved):
    with pytest.raises(InputError, match="test version 3, this package reads 4"):
        load_sealed(saved, "test", 4)
    torch.save(STATE, saved)  # as before there were seals
    with pytest.raises(InputError, match="test version 3, this package reads 4"):
        load_sealed(saved, "test", 4)
    with pytest.raises(DamagedError, match="SHA-256, is missing"):
        load_sealed(saved, "test", 3)


def test_another_format_is_named(saved):
    with pytest.raises(InputError, match="format is 'test', expected 'other'"):
        load_sealed(saved, "other", 3)
    with pytest.raises(InputError, match=r"none.pt: no such file"):
        load_sealed(saved.with_name("none.pt"), "test", 3)


def test_only_zip_files_are_sealed():
    with pytest.raises(ValueError, match="not a zip file"):
        seal(io.BytesIO(b"x" * 100))
