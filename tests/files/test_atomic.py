"""The old file or the new one, whatever happens while it is written."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys

import pytest
import torch

from flatprune.files.sealed import save_sealed


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "state.pt"
    save_sealed(path, {"value": torch.arange(3)})
    return path


def test_saves_and_replaces(saved):
    save_sealed(saved, {"value": torch.arange(5)})
    assert torch.equal(torch.load(saved, weights_only=True)["value"], torch.arange(5))
    assert list(files(saved.parent)) == ["state.pt"]


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_failing_call_keeps_the_old_file(saved, monkeypatch, step):
    before = files(saved.parent)

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        save_sealed(saved, {"value": torch.arange(5)})
    assert files(saved.parent) == before


def in_a_process(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


def test_a_write_that_the_system_cuts_off_keeps_the_old_file(saved):
    before = files(saved.parent)
    code = """
import resource, signal, sys, torch
from flatprune.files.sealed import save_sealed
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))  # as a full disk: only so many bytes go out
save_sealed(sys.argv[1], {"value": torch.zeros(100000)})
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
from flatprune.files.sealed import save_sealed
{moment} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
save_sealed(sys.argv[1], {{"value": torch.zeros(100000)}})
"""
    assert in_a_process(code, saved).returncode == -9
    assert saved.read_bytes() == before
    save_sealed(saved, {"value": torch.arange(7)})  # what the killed one left does not stand in the way
    assert list(files(saved.parent)) == ["state.pt"]
