"""One process at a time in a folder."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flatprune.errors import InputError
from flatprune.files.lock import HOLDER_FILE, locked

HOLD = """
import sys, time
from pathlib import Path
from flatprune.files.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_the_holder_is_named(tmp_path):
    with locked(tmp_path):
        with pytest.raises(InputError, match=f"in use by process {os.getpid()} on "), locked(tmp_path):
            pass
        assert (tmp_path / HOLDER_FILE).exists()  # the one that was refused took nothing away
    assert not (tmp_path / HOLDER_FILE).exists()
    with locked(tmp_path):
        pass


def test_a_killed_process_holds_nothing(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    process.stdout.readline()
    with pytest.raises(InputError, match=f"in use by process {process.pid} on "), locked(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with locked(tmp_path):
        assert (tmp_path / HOLDER_FILE).read_text().startswith(f"process {os.getpid()} on ")


def test_waiting_for_the_other(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    process.stdout.readline()
    threading.Timer(0.2, process.kill).start()
    with locked(tmp_path, wait=True):
        assert process.wait() == -signal.SIGKILL
    process.stdout.close()


def test_a_removed_folder_is_made_again_with_its_lock(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with locked(folder) as lock:
        shutil.rmtree(folder)
        lock.hold()
        with pytest.raises(InputError, match="in use"), locked(folder):
            pass
        shutil.rmtree(folder)
        folder.mkdir()
        with locked(folder), pytest.raises(InputError, match="in use"):  # somebody else has begun there
            lock.hold()


def test_a_full_disk_leaves_the_lock_without_a_name(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with locked(tmp_path), pytest.raises(InputError, match="in use by another process"), locked(tmp_path):
        pass


def test_folders_that_are_taken_too(tmp_path):
    with locked(tmp_path) as lock:
        for _ in range(2):
            lock.take(["a", "b"])
        shutil.rmtree(tmp_path / "b")
        lock.hold()
        for name in "ab":
            with pytest.raises(InputError, match=f"{name}: in use"), locked(tmp_path / name):
                pass
    for name in "ab":
        with locked(tmp_path / name):
            pass


def test_a_folder_that_cannot_be_taken_too(tmp_path):
    (tmp_path / "a").mkdir()
    with locked(tmp_path / "a"), locked(tmp_path) as lock, pytest.raises(InputError, match="a: in use"):
        lock.take(["a"])
