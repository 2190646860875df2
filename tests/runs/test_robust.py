"""Runs whose surroundings fail: they end with a checkpoint or go on, and leave nothing half-written."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import pty
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from flatprune import runs
from flatprune.cli import main
from flatprune.errors import InputError, Interrupted
from flatprune.files import atomic
from flatprune.files.lock import locked
from flatprune.reporting import report
from flatprune.reporting.progress import SteadyConsole, observer
from flatprune.runs.folder import FINE, check_run
from flatprune.settings import Settings
from flatprune.signals import stop_signals
from flatprune.training.trainer import Observer
from tests.runs.conftest import SMALL
from tests.training.acting import At

OPTIONS = [
    "--widths",
    "8,6",
    "--epochs",
    "2",
    "--train-size",
    "120",
    "--batch-size",
    "40",
    "--target-params",
    "0.5",
    "--threads",
    "1",
]


@pytest.fixture(autouse=True)
def without_report(monkeypatch):
    """Drawing takes longer than these runs."""
    monkeypatch.setattr(report, "write_report", lambda *_: None)


def tensors(folder):
    return torch.load(folder / "model.pt", weights_only=True)["state_dict"]


def assert_whole(folder, like):
    assert set(check_run(folder).values()) <= set(FINE)
    assert all(torch.equal(value, tensors(like)[name]) for name, value in tensors(folder).items())


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    runs.run(SMALL, folder)
    return folder


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU])
def test_signals_that_ask_to_end_leave_a_checkpoint(tmp_path, whole, number):
    def ask():
        for _ in range(3):  # as a scheduler that insists
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match="stopped at step 4 of 6"):
        runs.run(SMALL, tmp_path / "run", observer=lambda _: At(4, ask))
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["progress"]["step"] == 4
    runs.resume(tmp_path / "run")
    assert_whole(tmp_path / "run", whole)


def test_a_signal_that_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as stop_requested:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop_requested()
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop_requested()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_folder_that_is_removed_is_made_again(tmp_path, whole, step):
    folder = tmp_path / "run"
    runs.run(SMALL, folder, observer=lambda _: At(step, lambda: shutil.rmtree(folder)))
    assert_whole(folder, whole)


def test_a_folder_that_another_run_has_taken_is_left_to_it(tmp_path, flatprune):
    folder = tmp_path / "run"
    taken = contextlib.ExitStack()

    def take():
        shutil.rmtree(folder)
        folder.mkdir()
        taken.enter_context(locked(folder))

    with taken, pytest.raises(InputError, match="in use by process"):
        runs.run(SMALL, folder, observer=lambda _: At(2, take))
    assert not (folder / "checkpoint.pt").exists()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_is_full_at_any_write(tmp_path, whole, call, monkeypatch):
    """Every write of a run fails once; what is there then can be resumed, and ends alike."""
    folder, real, count = tmp_path / "run", getattr(os, call), iter(range(10**9))
    failing = None

    def fail(*arguments):
        if next(count) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, call, fail)
    runs.run(SMALL, tmp_path / "counted")
    total = next(count)
    for failing in range(0, total, 3):
        shutil.rmtree(folder, ignore_errors=True)
        count = iter(range(10**9))
        with pytest.raises(OSError, match=r"cannot be saved \(No space left on device\)") as error:
            runs.run(SMALL, folder)
            raise OSError("cannot be saved (No space left on device)")  # a sync of a folder is allowed to fail
        failing = None
        assert error.value.filename is None or not os.path.exists(f"{error.value.filename}.tmp")
        if (folder / "checkpoint.pt").exists():
            runs.resume(folder)
        else:
            runs.run(SMALL, folder)
        assert_whole(folder, whole)


class Full(io.FileIO):
    """A file on a disk that has room for half of what is written."""

    def write(self, data):
        super().write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")


FILES = ("checkpoint.pt", "history.jsonl", "model.pt", "digests.json", "summary.json")


@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_keeps_what_was_there(tmp_path, whole, name, monkeypatch, flatprune):
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        runs.run(SMALL, folder, observer=lambda _: At(4, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(path, mode):
        return (Full if os.path.basename(path) == f"{name}.tmp" else open)(path, mode)

    with monkeypatch.context() as patched:
        patched.setattr(atomic, "open", full, raising=False)
        outcome = flatprune("run", "--resume", "--out", folder)
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert f"{folder / name}: cannot be saved (No space left on device)" in outcome.err
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after.get(name) == before.get(name) and f"{name}.tmp" not in after
    assert flatprune("run", "--resume", "--out", folder).code == 0
    assert_whole(folder, whole)


def test_no_room_for_the_first_checkpoint(tmp_path, whole, monkeypatch, flatprune):
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(atomic, "open", Full, raising=False)
        outcome = flatprune("run", *OPTIONS, "--out", folder)
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and f"{folder / 'checkpoint.pt'}: cannot" in outcome.err
    assert flatprune("run", *OPTIONS, "--out", folder).code == 0
    assert_whole(folder, whole)


@pytest.mark.parametrize("part", ["dense", "pruned"])
def test_the_dense_folder_of_a_run_is_in_use(tmp_path, part, flatprune):
    folder, outcomes = tmp_path / "run", []

    def begin_there():
        outcomes.append(flatprune("run", *OPTIONS, "--out", folder / "dense", "--overwrite"))

    settings = SMALL.changed(compare_dense=True)
    runs.run(settings, folder, observer=lambda title: At(2, begin_there) if title == part else Observer())
    (outcome,) = outcomes
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert f"{folder / 'dense'}: in use by process {os.getpid()}" in outcome.err
    assert set(check_run(folder).values()) <= set(FINE)


def test_a_run_in_the_dense_folder_is_not_replaced(tmp_path, flatprune):
    folder, outcomes = tmp_path / "run", []

    def begin_above():
        for more in ((), ("--compare-dense",)):
            outcomes.append(flatprune("run", *OPTIONS, "--out", folder, "--overwrite", *more))

    runs.run(SMALL, folder / "dense", observer=lambda _: At(4, begin_above))
    assert [(outcome.code, "dense: in use by process" in outcome.err) for outcome in outcomes] == [(2, True)] * 2
    assert not (folder / "checkpoint.pt").exists()
    assert set(check_run(folder / "dense").values()) <= set(FINE)


def test_another_run_in_the_dense_folder_is_no_comparison(tmp_path, flatprune):
    folder = tmp_path / "run"
    ask = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    with pytest.raises(Interrupted):
        runs.run(SMALL.changed(compare_dense=True), folder, observer=lambda _: At(1, ask))
    runs.run(SMALL, folder / "dense", overwrite=True)
    outcome = flatprune("run", "--resume", "--out", folder)
    assert outcome.code == 2 and f"{folder / 'dense' / 'settings.json'}: is of another run" in outcome.err
    shutil.rmtree(folder / "dense")
    (folder / "dense").mkdir()  # as a run does first
    assert set(check_run(folder).values()) == {"whole"}
    assert flatprune("run", "--resume", "--out", folder).code == 0


def test_a_report_that_cannot_be_drawn_is_no_loss(tmp_path, whole, monkeypatch):
    def fail(*_):
        raise ValueError("a glyph")

    monkeypatch.setattr(report, "write_report", fail)
    with pytest.warns(UserWarning, match="the report could not be made"):
        runs.run(SMALL, tmp_path / "run")
    assert_whole(tmp_path / "run", whole)
    assert runs.is_finished(tmp_path / "run")


def run_in(tmp_path, *options, **streams):
    command = [sys.executable, "-m", "flatprune", "run", *OPTIONS, "--out", str(tmp_path / "run"), *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, **streams)


@pytest.mark.thorough
def test_a_run_goes_on_without_its_pipe(tmp_path, whole):
    process = run_in(tmp_path, stdout=subprocess.PIPE)
    process.stdout.close()  # as `| head -0`
    assert (process.communicate()[1], process.returncode) == (b"", 0)
    assert_whole(tmp_path / "run", whole)
    with open("/dev/full", "w") as full:
        evaluated = subprocess.run(
            [sys.executable, "-m", "flatprune", "eval", str(tmp_path / "run")], stdout=full, stderr=subprocess.PIPE
        )
    assert evaluated.returncode == 2 and b"No space left" in evaluated.stderr and evaluated.stderr.count(b"\n") == 1


@pytest.mark.parametrize("terminal", [False, True])
def test_a_log_on_a_full_disk_ends_the_log_alone(tmp_path, whole, terminal):
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:
        console = SteadyConsole(file=full, force_terminal=terminal)
        runs.run(SMALL, tmp_path / "run", observer=lambda title: observer(console, title))
        assert console.quiet
    assert_whole(tmp_path / "run", whole)


@pytest.mark.thorough
def test_a_lost_terminal_ends_with_a_checkpoint_or_goes_on(tmp_path):
    master, slave = pty.openpty()
    process = run_in(tmp_path, "--epochs", "100000", stdout=slave, stdin=slave, start_new_session=True)
    os.close(slave)
    while not (tmp_path / "run" / "history.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.close(master)  # EIO from here on
    before = (tmp_path / "run" / "history.jsonl").stat().st_mtime_ns
    deadline = time.monotonic() + 120
    while (tmp_path / "run" / "history.jsonl").stat().st_mtime_ns == before:
        assert process.poll() is None and time.monotonic() < deadline  # it goes on
        time.sleep(0.02)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=120)
    assert process.returncode == 130
    assert set(check_run(tmp_path / "run").values()) == {"whole"}


def test_the_clock_does_not_matter(tmp_path, whole, monkeypatch):
    now = iter(range(2_000_000_000, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    runs.run(SMALL, tmp_path / "run")
    assert_whole(tmp_path / "run", whole)


def test_a_read_only_folder_is_refused_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda *_: False)  # as for anybody but root
    assert main(["run", *OPTIONS, "--out", str(tmp_path / "run")]) == 2
    assert "cannot be written to" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_no_memory_is_one_line(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise MemoryError("Unable to allocate 9 TiB")

    monkeypatch.setattr(Settings, "dataset", fail)
    assert main(["run", *OPTIONS, "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == "flatprune: not enough memory: Unable to allocate 9 TiB\n"
