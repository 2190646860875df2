"""One process at a time in a folder."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading

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
