"""The families of damaged files, kills and a long run: a few cases of each, and that they find what is wrong."""

from __future__ import annotations

import faulthandler
import os
import signal
import time

import pytest
import torch

from bench.hard import damage, kills, long_run
from bench.hard.forks import forked
from flatprune.reporting import report
from flatprune.runs import found
from flatprune.study import report as study_report
from flatprune.study import whole

pytestmark = pytest.mark.thorough  # forks and runs by the dozen

COMMANDS = (damage._eval, damage._load, damage._resume, damage._resume_stopped, damage._check)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Forks of this process, whose pool of threads they have not, compute with one; the drawing is left out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for module, name in ((report, "write_report"), (study_report, "figure"), (study_report, "png")):
        monkeypatch.setattr(module, name, getattr(module, name))  # to be put back in the end
    yield
    torch.set_num_threads(threads)


def dies():
    faulthandler.disable()  # no dump among the tests' output
    os.kill(os.getpid(), signal.SIGSEGV)


def test_what_became_of_a_fork():
    assert forked(lambda: {"a": 1}).value == {"a": 1}
    assert forked(dies).signal == signal.SIGSEGV
    assert forked(lambda: time.sleep(60), seconds=0.1).hung
    assert forked(lambda: time.sleep(60), kill_after=0.1).signal == signal.SIGKILL


def test_damaged_files_are_found():
    tally = damage.run(12, 11, 60.0, COMMANDS, exports=("safetensors",))
    assert tally.sound and tally.tried > 5, tally.examples


def test_files_that_nobody_checks_are_silent(monkeypatch):
    monkeypatch.setattr(whole, "check_run", lambda folder: {"summary.json": "whole"})
    tally = damage.run(5, 1, 60.0, [damage._check], exports=())
    assert tally.silent == tally.tried > 0 and not tally.sound


def test_killed_runs_end_alike():
    tally = kills.run(1, 11, 60.0, first=1)
    assert tally.sound and (tally.tried, tally.next) == (1, 2), tally.examples


def test_runs_that_cannot_go_on_are_found(monkeypatch):
    real = found.load_checkpoint

    def forgetful(path):
        state = real(path)
        state["progress"]["best_accuracy"] = -1.0
        return {**state, "history": []}

    monkeypatch.setattr(found, "load_checkpoint", forgetful)
    tally = kills.run(3, 11, 60.0)
    assert tally.lost + tally.unclear > 0


def test_a_long_run_takes_no_more_and_more(monkeypatch):
    assert long_run.run(90, 0, 60.0).sound
    counts = iter(range(10**6))
    monkeypatch.setattr(long_run, "_use", lambda folder: (0, next(counts), 1, 1))
    tally = long_run.run(90, 0, 60.0)
    assert tally.wrong == 1 and "open files" in tally.examples[0]
