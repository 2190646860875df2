"""Executors that other people keep: what they are given, what they answer, and the same runs from each."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from flatprune.cli.study import EXECUTOR_NAMES
from flatprune.errors import InputError, MissingPackageError, RunsFailedError
from flatprune.execution import EXECUTORS, FAILED, Ended, Pool, Task, clusters, executor_options, make_executor
from flatprune.execution.local import Local
from flatprune.execution.task import FINISHED, STOP_FILE, STOPPED, make, read_steps
from flatprune.runs import TIMES
from flatprune.settings import Settings
from tests.study.study_command import command

SETTINGS = Settings(widths=(8, 8), epochs=1, flatness="off", target_params=0.5)
ONE_RUN = """
base: {data: digits, model: mlp, epochs: 25, target_params: 0.5, widths: [8, 8], flatness: off, test_every: 30}
"""


def answer(task):
    """Stands for a run where only the way to it is tested."""
    return Ended(FINISHED, f"{Path(task.folder).name} of {task.threads}")


def answers(executor, folder, numbers=(1, 2)):
    """What an executor answers for tasks, two at a time."""
    pool = Pool(executor, 2)
    found = {}
    for number in numbers:
        pool.start(str(number), f"run {number}", SETTINGS, folder / str(number))
    deadline = time.monotonic() + 300
    while pool.running and time.monotonic() < deadline:
        found |= {running.key: ended for running, ended in pool.wait()}
    pool.close()
    return found


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("slurm", {}, ["no executor 'slurm'"]),
        ("submitt", {}, ["did you mean submitit"]),
        ("local", {"cpus": "2"}, ["no option 'cpus'", "it has none"]),
        ("submitit", {"partitoin": "gpu"}, ["'partitoin'", "did you mean partition"]),
        ("submitit", {"time": "1 hour"}, ["time is '1 hour'", "a whole number"]),
        ("submitit", {"gpus": "-1"}, ["gpus is '-1'", "0 or more"]),
        ("submitit", {"cluster": "pbs"}, ["cluster is 'pbs'", "slurm"]),
        ("dask", {"workers": 0}, ["workers is 0", "1 or more"]),
        ("ray", {"cpus": "0"}, ["cpus is '0'", "above 0"]),
    ],
)
def test_options_that_cannot_be_used(name, given, words):
    with pytest.raises(InputError) as error:
        executor_options("options", name, given)
    for word in ("options", *words):
        assert word in str(error.value)


def test_options_from_the_line_win_over_the_file(study_file, study, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("flatprune.study.schedule.make_executor", lambda *given: seen.append(given) or Refusing())
    path = study_file(ONE_RUN + "executors: {submitit: {partition: cpu, time: 5}}\n")
    line = ("--executor", "submitit", "--executor-option", "partition=gpu", "--executor-option", "gpus=2")
    outcome = study(path, "--out", tmp_path / "out", *line)
    assert outcome.returncode == 2 and "was not taken by the executor (full)" in outcome.stderr
    (name, options, folder, _) = seen[0]
    assert (name, options.partition, options.time, options.gpus) == ("submitit", "gpu", 5, 2)
    assert folder == tmp_path / "out"


class Refusing:
    look_seconds = 0.0

    def default_jobs(self, on_gpus):
        return 1

    def submit(self, task, place):
        raise RuntimeError("full")

    def reason(self, error):
        return str(error)

    def close(self, *, kill=False):
        pass


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("executors: {dusk: {}}", ["executors", "'dusk'", "did you mean dask"]),
        ("executors: {dask: {adress: x}}", ["'adress'", "did you mean address"]),
        ("executors: [dask]", ["executors is ['dask']"]),
    ],
)
def test_a_section_that_cannot_be_used(study_file, study, text, words):
    outcome = study(study_file(ONE_RUN + text))
    assert outcome.returncode == 2 and outcome.stderr.count("\n") == 1
    for word in ("small.yaml", *words):
        assert word in outcome.stderr


@pytest.mark.parametrize(("name", "package"), [("submitit", "submitit"), ("dask", "distributed"), ("ray", "ray")])
def test_a_missing_package_is_named(name, package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=f"pip install 'kfac-ext\\[{name}\\]'"):
        make_executor(name, executor_options("", name, {}), tmp_path, None)


def test_submitit(tmp_path, monkeypatch):
    monkeypatch.setattr(clusters, "make_apart", answer)
    executor = make_executor("submitit", executor_options("", "submitit", {"cluster": "debug"}), tmp_path, None)
    assert answers(executor, tmp_path)["2"] == Ended(FINISHED, "2 of 1")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="no sbatch"):
        make_executor("submitit", executor_options("", "submitit", {}), tmp_path, None)


def test_submitit_queues_a_run_again():
    import submitit

    task = Task("/a", "/")
    delayed = clusters._Requeued().checkpoint(task)
    assert isinstance(delayed, submitit.helpers.DelayedSubmission) and delayed.args == (task,)
    assert isinstance(delayed.function, clusters._Requeued)


def test_dask(tmp_path, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(clusters, "make_apart", answer)
    executor = make_executor("dask", executor_options("", "dask", {"workers": 2}), tmp_path, None)
    assert answers(executor, tmp_path) == {"1": Ended(FINISHED, "1 of 1"), "2": Ended(FINISHED, "2 of 1")}


def test_dask_without_a_scheduler(tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")

    def refuse(*given, **options):
        raise OSError("Timed out")

    monkeypatch.setattr(distributed, "Client", refuse)
    with pytest.raises(InputError, match=r"no scheduler answers at tcp://127.0.0.1:1 \(Timed out\)"):
        make_executor("dask", executor_options("", "dask", {"address": "tcp://127.0.0.1:1"}), tmp_path, None)


class StubOfRay:
    """The part of Ray's interface that is used, after its documentation; the work is done at once."""

    def __init__(self):
        self.started = self.cancelled = None

    def init(self, address, **options):
        self.started = address, options["num_cpus"]

    def remote(self, **options):
        self.options = options
        return lambda function: SimpleNamespace(remote=lambda task: self.reference(function(task)))

    def reference(self, result):
        future = SimpleNamespace(done=lambda: True, result=lambda: result)
        return SimpleNamespace(future=lambda: future)

    def cancel(self, reference, force):
        self.cancelled = force

    def shutdown(self):
        self.started = None


def test_ray(tmp_path, monkeypatch):
    stub = StubOfRay()
    monkeypatch.setitem(sys.modules, "ray", stub)
    monkeypatch.setattr(clusters, "make_apart", answer)
    executor = make_executor("ray", executor_options("", "ray", {"gpus": "0.5"}), tmp_path, 3)
    assert stub.started == ("local", 3) and stub.options["num_gpus"] == 0.5
    assert answers(executor, tmp_path)["1"] == Ended(FINISHED, "1 of 1") and stub.started is None
    with pytest.raises(InputError, match=r"no cluster answers at ray://127.0.0.1:1 \(.*refused"):
        make_executor("ray", executor_options("", "ray", {"address": "ray://127.0.0.1:1"}), tmp_path, None)


@pytest.mark.thorough
def test_a_place_is_taken_again_after_a_kill(tmp_path, monkeypatch):
    monkeypatch.setattr("flatprune.execution.local.make", kill_or_answer)
    pool = Pool(Local(), 1)
    for name, expected in (("1", Ended(FAILED, "ended by SIGKILL(-9)")), ("2", Ended(FINISHED, "2 of 1"))):
        pool.start(name, name, SETTINGS, tmp_path / name)
        while pool.running:
            for _, ended in pool.wait():
                assert ended == expected
    pool.close()


def kill_or_answer(task):
    import os

    if Path(task.folder).name == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return answer(task)


def test_a_task_stops_where_it_is_told_to(tmp_path):
    (tmp_path / STOP_FILE).touch()
    assert make(Task(str(tmp_path), str(tmp_path))) == Ended(STOPPED) and read_steps(tmp_path) is None


def test_an_executor_that_takes_nothing(tmp_path):
    with pytest.raises(RunsFailedError, match=r"run 1: was not taken by the executor \(full\)"):
        answers(Refusing(), tmp_path)


def figures(out):
    (summary,) = out.glob("runs/*/summary.json")
    found = json.loads(summary.read_text())
    own = (*TIMES, "valleys")
    return summary.parent.name, {key: value for key, value in found.items() if key not in own}


@pytest.mark.thorough
def test_killed_on_dask_and_finished_by_submitit(study_file, study, tmp_path):
    """The same run, bit for bit, as from this machine alone."""
    pytest.importorskip("distributed")
    path, out = study_file(ONE_RUN), tmp_path / "out"
    assert study(path, "--out", tmp_path / "local").returncode == 0
    process = subprocess.Popen(
        command(path, "--out", out, "--executor", "dask"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    while not [file for file in out.glob("runs/*/history.jsonl") if '"epoch": 2' in file.read_text()]:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert not list(out.glob("runs/*/summary.json"))
    outcome = study(path, "--out", out, "--executor", "submitit", "--executor-option", "cluster=local")
    assert outcome.returncode == 0, outcome.stderr
    assert figures(out) == figures(tmp_path / "local")
    here, there = ({file.name for file in place.glob("runs/*/*")} for place in (tmp_path / "local", out))
    assert here == there


def test_the_command_line_knows_all_of_them():
    assert list(EXECUTORS) == EXECUTOR_NAMES
