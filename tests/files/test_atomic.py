"""The old file or the new one, whatever happens while it is written."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys

import pytest
import torch

from flatprune import checkpoint
from flatprune.errors import InputError


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "state.pt"
    checkpoint.save_atomically(path, {"value": torch.arange(3)})
    return path


def test_saves_and_replaces(saved):
    checkpoint.save_atomically(saved, {"value": torch.arange(5)})
    assert torch.equal(torch.load(saved, weights_only=True)["value"], torch.arange(5))
    assert list(files(saved.parent)) == ["state.pt"]


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_failing_call_keeps_the_old_file(saved, monkeypatch, step):
    before = files(saved.parent)

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save_atomically(saved, {"value": torch.arange(5)})
    assert files(saved.parent) == before


def in_a_process(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


def test_a_write_that_the_system_cuts_off_keeps_the_old_file(saved):
    before = files(saved.parent)
    code = """
import resource, signal, sys, torch
from flatprune import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))  # as a full disk: only so many bytes go out
checkpoint.save_atomically(sys.argv[1], {"value": torch.zeros(100000)})
"""
    done = in_a_process(code, saved)
    assert done.returncode == 1 and "OSError" in done.stderr
    assert files(saved.parent) == before
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 5000


@pytest.mark.parametrize("moment", ["os.fsync", "os.replace"])
def test_a_process_killed_while_saving_keeps_the_old_file(saved, moment):
    before = saved.read_bytes()
    code = f"""
import os, signal, sys, torch
from flatprune import checkpoint
{moment} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save_atomically(sys.argv[1], {{"value": torch.zeros(100000)}})
"""
    assert in_a_process(code, saved).returncode == -9
    assert saved.read_bytes() == before
    checkpoint.save_atomically(saved, {"value": torch.arange(7)})  # what the killed one left does not stand in the way
    assert list(files(saved.parent)) == ["state.pt"]


def test_json_has_no_nan(tmp_path):
    checkpoint.write_json(tmp_path / "a.json", {"x": float("nan"), "y": [1.5, float("inf")]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": None, "y": [1.5, None]}


def test_foreign_files_are_named(saved, tmp_path):
    with pytest.raises(InputError, match=r"state\.pt: format is None"):
        checkpoint.load_checkpoint(saved)
    with pytest.raises(InputError, match=r"none\.pt: no such file"):
        checkpoint.load_checkpoint(tmp_path / "none.pt")
    checkpoint.save_atomically(saved, {"format": checkpoint.CHECKPOINT_FORMAT, "version": 99})
    with pytest.raises(InputError, match="version 99"):
        checkpoint.load_checkpoint(saved)
