"""The families of random calls: a few cases of each, and that they find what is wrong."""

import faulthandler
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

import kfac_ext
from bench.hard import __main__ as hard
from bench.hard import batches, hostile, random_calls, valid

pytestmark = pytest.mark.thorough  # forks and runs by the dozen

FAMILIES = ("valid", "hostile", "geometry", "memory")


@pytest.fixture
def alone(monkeypatch):
    """Children of this process, whose pool of threads they have not, compute with one."""
    torch.set_num_threads(1)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)


def test_a_few_cases_of_each_family_are_sound(tmp_path):
    limits = ["--cases", "120", "--seed", "11", "--seconds", "20", "--json", str(tmp_path / "tallies.json")]
    run = subprocess.run([sys.executable, "-m", "bench.hard", *FAMILIES, *limits], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    tallies = json.loads((tmp_path / "tallies.json").read_text())
    assert [tally["family"] for tally in tallies] == list(FAMILIES)
    assert all(tally["tried"] > 20 for tally in tallies)


def test_a_call_of_a_number_is_the_same_again(alone):
    first, second = random_calls.random_call(3, 5), random_calls.random_call(3, 5)
    assert str(first) == str(second)
    tensors = [[v for v in call.arguments.values() if isinstance(v, torch.Tensor)] for call in (first, second)]
    assert tensors[0] and all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*tensors))


def test_a_wrong_result_is_found(alone, monkeypatch):
    def spoiled(x, *, bias=False):
        return kfac_ext.reference.linear_covariance(x, bias=bias) * 1.001

    monkeypatch.setattr(kfac_ext, "linear_covariance", spoiled)
    monkeypatch.setattr(random_calls, "MAKERS", (random_calls.linear,))
    assert valid.run(30, seed=0, seconds=60.0).wrong > 3


def test_what_is_accepted_is_found(alone, monkeypatch):
    monkeypatch.setattr(kfac_ext, "linear_covariance", lambda x, bias=False: None)
    monkeypatch.setattr(random_calls, "MAKERS", (random_calls.linear,))
    assert hostile.run(30, seed=0, seconds=60.0).silent > 3


def dies(_seed, index):
    if index == 3:
        faulthandler.disable()  # no dump among the tests' output
        os.kill(os.getpid(), signal.SIGSEGV)
    if index == 5:
        os._exit(7)
    if index == 6:
        raise KeyError("of the case itself")
    return [("unclear", "no name")] if index == 4 else []


def test_the_case_that_ends_a_process_is_named():
    tally = batches.run_forked("family", dies, 8, 0, 60.0, batch=4)
    assert (tally.tried, tally.crashed, tally.unclear, tally.wrong) == (8, 2, 1, 1)
    crashes = [text for text in tally.examples if text.startswith("crashed")]
    assert "--only 3" in crashes[0] and "SIGSEGV" in crashes[0] and "--only 5" in crashes[1] and "exit 7" in crashes[1]
    assert not tally.sound


def test_a_case_that_hangs_is_a_crash(monkeypatch):
    monkeypatch.setattr(batches, "_HUNG", 0.3)
    tally = batches.run_forked("family", lambda seed, index: signal.pause() if index == 1 else [], 3, 0, 60.0)
    assert (tally.tried, tally.crashed) == (3, 1) and "hung" in tally.examples[0]


def test_the_limit_of_seconds_ends_in_order():
    tally = batches.run_forked("family", lambda seed, index: [], 10**6, 0, 0.3)
    assert 0 < tally.tried < 10**6 and tally.sound


def test_one_case_alone(alone, capsys):
    assert hard.main(["valid", "--seed", "4", "--only", "17"]) == 0
    assert "valid" in capsys.readouterr().out


def test_parts_add_up_to_the_whole(alone, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(valid, "_case", lambda seed, index: [("unclear", "no name")] if index in (3, 6) else [])
    for cases in (4, 4, 9):
        hard.main(["valid", "--cases", str(cases), "--json", str(tmp_path / "tallies.json")])
        (tally,) = json.loads((tmp_path / "tallies.json").read_text())
        seen.append((tally["tried"], tally["next"], tally["unclear"]))
    assert seen == [(4, 4, 1), (4, 4, 1), (9, 9, 2)]
    assert [text.split(":")[1] for text in tally["examples"]] == [" --seed 0 --only 3", " --seed 0 --only 6"]
    hard.main(["valid", "--cases", "2", "--seed", "5", "--json", str(tmp_path / "tallies.json")])
    assert [tally["seed"] for tally in json.loads((tmp_path / "tallies.json").read_text())] == [0, 5]


@pytest.mark.parametrize("text", ["{", "[1]", '[{"family": "valid"}]'])
def test_a_file_that_holds_no_tallies_is_named(text, tmp_path, capsys):
    (tmp_path / "tallies.json").write_text(text)
    with pytest.raises(SystemExit):
        hard.main(["valid", "--json", str(tmp_path / "tallies.json")])
    assert "tallies.json: holds no tallies" in capsys.readouterr().err
