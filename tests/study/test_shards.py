"""Parts of a study that several processes make at once."""

from __future__ import annotations

import json

import pytest

from flatprune.files.lock import locked
from flatprune.study import read_study
from flatprune.study.plan import Plan

TEXT = """
base: {data: digits, model: mlp, epochs: 1, target_params: 0.5, widths: [8, 8], flatness: off, train_size: 200}
grid: {seed: [1, 2, 3]}
variants:
  method: {}
  same: {}
  scratch: {scratch_of: method}
  other: {lr: 0.2}
  tuned: {tune: {lr: [0.1, 0.3]}}
"""


@pytest.mark.parametrize("total", [2, 3, 20])
def test_shards_share_no_run_and_make_them_all(study_file, tmp_path, total):
    study = read_study(study_file(TEXT))
    shards = [Plan(study, tmp_path, {"digits": "digits"}, shard=(i, total)) for i in range(1, total + 1)]
    keys = [{key for key, _, _ in plan.wanted()} for plan in shards]
    assert sum(map(len, keys)) == len(set().union(*keys)) == 3 + 3 + 4
    assert sum(len(plan.own_cells) for plan in shards) == len(study.cells)
    for plan in shards:
        own = {(cell.variant, cell.seed) for cell in plan.own_cells}
        assert all(("method", seed) in own for variant, seed in own if variant in ("same", "scratch"))
        assert len([1 for variant, _ in own if variant == "tuned"]) in (0, 3)
    assert sum(map(bool, keys)) == min(total, 3 + 3 + 1)


@pytest.mark.parametrize(("shard", "words"), [("3/2", "shard is 3/2"), ("0/2", "shard is 0/2"), ("a", "--shard is a")])
def test_a_shard_that_is_none(study_file, study, tmp_path, shard, words):
    outcome = study(study_file(), "--out", tmp_path / "out", "--shard", shard)
    assert outcome.returncode == 2 and words in outcome.stderr and outcome.stderr.count("\n") == 1


def test_a_shard_is_made_once_at_a_time(study_file, study, tmp_path):
    place = tmp_path / "out" / "shards" / "1-of-2"
    place.mkdir(parents=True)
    with locked(place):
        outcome = study(study_file(), "--out", tmp_path / "out", "--shard", "1/2")
    assert outcome.returncode == 2 and "1-of-2: in use by process" in outcome.stderr


@pytest.mark.thorough
def test_the_last_shard_reports_all(study_file, study, tmp_path):
    path, out = study_file(TEXT.replace("[1, 2, 3]", "[1]")), tmp_path / "out"
    assert "small: 7 runs" in study(path, "--out", out, "--shard", "1/2").stdout
    assert study(path, "--out", out, "--shard", "2/2").returncode == 0
    groups = json.loads((out / "results.json").read_text())["groups"]
    assert len(groups) == 5 and not any(group["state"] for group in groups)
