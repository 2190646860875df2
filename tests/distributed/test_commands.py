"""`flatprune run` by several processes: one run, written and told by the first."""

import json
import os
import subprocess
import sys

import pytest
import torch

from flatprune.checkpoint import load_checkpoint
from flatprune.cli import main
from flatprune.runs import TIMES
from tests.distributed import commands
from tests.distributed.ranks import Ranks

RUN = ("run", "--data", "digits", "--train-size", 240, "--batch-size", 24, "--epochs", 4, "--widths", "24,16")
PRUNED = (*RUN, "--target-params", 0.4, "--prune-end", 0.7, "--mixup", 0.2, "--accumulate", 2, "--ema", 0.9)


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def whole(two, tmp_path_factory):
    """A run by two ranks: (folder, what each rank said)."""
    folder = tmp_path_factory.mktemp("ranks") / "whole"
    return folder, two.run(commands.call, [*PRUNED, "--out", folder])


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        own = (*TIMES, "launch")
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key not in own)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def distance(a, b):
    pairs = zip(a["model"].values(), b["model"].values())
    return max(float((x - y).abs().max()) for x, y in pairs)


def neurons(state):
    return [record["neurons"] for record in state["pruner"]["history"]]


def test_only_the_first_rank_speaks(whole):
    folder, ((code, out, err), (other_code, other_out, other_err)) = whole
    assert code == other_code == 0, err + other_err
    assert "epoch 4/4" in out and f"results in {folder}" in out.replace("\n", "")
    assert other_out == other_err == ""
    assert "told to the other processes" in out and "factors" in out
    assert (folder / "summary.json").is_file()


def test_what_is_told_is_counted(whole):
    summary = json.loads((whole[0] / "summary.json").read_text())
    traffic, sizes = summary["traffic"], (65, 24, 25, 16, 17, 10)
    assert summary["ranks"] == 2
    assert traffic["gradients"]["calls"] == traffic["flags of steps"]["calls"] == summary["steps"]
    assert traffic["factors"]["calls"] == 2 * -(-summary["steps"] // 5)  # two parts a batch, an update every 5th
    words = 3 + 4 + 3 + 2 * 2  # flags, faults, layers, samples and clocks
    first = 4 * (sum(n * (n + 1) // 2 for n in sizes) + words)
    assert traffic["factors"]["bytes"] < first * traffic["factors"]["calls"]  # which shrink with the network
    assert traffic["factors"]["bytes"] > 0.3 * first * traffic["factors"]["calls"]
    assert traffic["loss"]["bytes"] == 4 * traffic["loss"]["calls"] == 4  # the first, which the flatness term goes by


def test_the_same_as_one_process(whole, tmp_path):
    assert main([str(argument) for argument in (*PRUNED, "--out", tmp_path / "one")]) == 0
    ours, theirs = (load_checkpoint(folder / "checkpoint.pt") for folder in (whole[0], tmp_path / "one"))
    assert neurons(ours) == neurons(theirs) and len(neurons(ours)) > 2
    assert distance(ours, theirs) < 1e-5  # float32


@pytest.mark.parametrize("stop", [0, 1])
def test_stopped_and_resumed_it_ends_with_the_same_bits(two, whole, tmp_path, stop):
    said = two.run(commands.call, [*PRUNED, "--out", tmp_path], 2, stop)
    assert [code for code, *_ in said] == [130, 130]
    assert [("to go on: flatprune run --resume" in err) for *_, err in said] == [True, False]
    assert [code for code, *_ in two.run(commands.call, ["run", "--resume", "--out", tmp_path])] == [0, 0]
    assert same(load_checkpoint(whole[0] / "checkpoint.pt"), load_checkpoint(tmp_path / "checkpoint.pt"))


@pytest.mark.parametrize("before", [2, 1])
def test_resumed_by_another_number_of_ranks(two, whole, tmp_path, before):
    def call(ranks, *arguments):
        """What the first of so many ranks answers."""
        return two.run(commands.call, *arguments)[0] if ranks == 2 else commands.call(*arguments)

    assert call(before, [*PRUNED, "--out", tmp_path], 2, 0)[0] == 130
    code, _out, err = call(3 - before, ["run", "--resume", "--out", tmp_path])
    assert code == 0, err
    assert f"the checkpoint is of {before} ranks, and there are {3 - before}" in err
    ours, theirs = (load_checkpoint(folder / "checkpoint.pt") for folder in (whole[0], tmp_path))
    assert neurons(ours) == neurons(theirs) and distance(ours, theirs) < 1e-5


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--batch-size", 25), "batch_size is 25, expected a multiple of 2 for 2 ranks"),
        (("--data", "none.npz"), "none.npz: no such file"),
        (("--sync-batch-norm",), "sync_batch_norm: torch's SyncBatchNorm runs on GPUs only"),
        (("--compile",), "compile: not with several ranks"),
        (("--target-params", 0.001), "target_params is 0.001"),
    ],
)
def test_what_cannot_be_used_is_said_once(two, tmp_path, options, text):
    said = two.run(commands.call, [*RUN, *options, "--out", tmp_path / "new"])
    assert [code for code, *_ in said] == [2, 2]
    assert text in said[0][2] and said[1][2] == ""
    assert not (tmp_path / "new").exists()


def test_a_run_that_diverges(two, tmp_path):
    said = two.run(commands.call, [*RUN, "--lr", 1e6, "--flatness", "off", "--out", tmp_path / "new"])
    assert [code for code, *_ in said] == [2, 2]
    assert "the last good checkpoint is kept" in said[0][2] and said[1][2] == ""


def test_ranks_with_other_data(two, tmp_path):
    import numpy as np

    from tests.cli.small_images import image_arrays

    for name, seed in (("a.npz", 0), ("b.npz", 1)):
        arrays = image_arrays(shape=(8, 8, 1))
        arrays["x_train"] = np.roll(arrays["x_train"], seed, axis=0)
        np.savez(tmp_path / name, **arrays)
    run = ["run", "--data", tmp_path / "a.npz", "--epochs", 1, "--batch-size", 4, "--out", tmp_path / "new"]
    said = two.run(commands.spoiled, run, str(tmp_path / "b.npz"), 1)
    assert [code for code, *_ in said] == [2, 2]
    assert "ranks differ in data" in said[0][2] and said[1][2] == ""
    said = two.run(commands.spoiled, run, str(tmp_path / "c.npz"), 1)
    assert [code for code, *_ in said] == [2, 2]
    assert "rank 1: " in said[0][2] and "c.npz: no such file" in said[0][2] and said[1][2] == ""


def environment(**changes):
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RANK", "WORLD_", "MASTER_"))}
    return {**kept, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", **changes}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but not set: RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', expected a whole number"),
    ],
)
def test_what_torchrun_has_not_set(monkeypatch, capsys, tmp_path, changes, text):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    assert main([*map(str, RUN), "--out", str(tmp_path / "new")]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_rank_that_never_comes(monkeypatch, capsys, tmp_path):
    given = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0", "LOCAL_RANK": "0"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert main([*map(str, RUN), "--rank-timeout", "1", "--out", str(tmp_path / "new")]) == 2
    assert "rank 0 of 2: the others did not come in 1 s" in capsys.readouterr().err


KILLED = """
import os, signal, sys
from flatprune.cli import main
from flatprune.training import trainer
close = trainer.Trainer._close_epoch
def closing(self):
    if self.progress.epoch == 2 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return close(self)
trainer.Trainer._close_epoch = closing
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.thorough  # half a minute
def test_a_killed_rank_comes_again(whole, tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    arguments = [str(argument) for argument in (*PRUNED, "--out", tmp_path / "run")]
    done = subprocess.run(
        [*command, tmp_path / "killed.py", *arguments], env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, [line for line in done.stderr.splitlines() if "flatprune: " in line]
    assert same(load_checkpoint(whole[0] / "checkpoint.pt"), load_checkpoint(tmp_path / "run/checkpoint.pt"))


STUDY = """
base: {data: digits, train_size: 240, batch_size: 24, epochs: 1, widths: [12], target_params: 0.5}
grid: {seed: [1, 2]}
variants: {one: {}}
"""


@pytest.mark.thorough  # a quarter of a minute
def test_a_study_is_made_by_the_first_rank(tmp_path):
    (tmp_path / "study.yaml").write_text(STUDY)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "flatprune"]
    arguments = ["study", tmp_path / "study.yaml", "--out", tmp_path / "made", "--jobs", "1"]
    done = subprocess.run([*command, *arguments], env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2/2") == 1
    summaries = sorted(tmp_path.glob("made/runs/*/summary.json"))
    assert len(summaries) == 2
    assert all("traffic" not in json.loads(path.read_text()) for path in summaries)


@pytest.mark.thorough
def test_ranks_end_well_right_after_a_collective():
    """Threads of gloo that hold its tensors have let go of them; without that time about one pair in ten aborts."""
    ends = [sys.executable, "-m", "tests.distributed.ends", "12"]
    run = subprocess.run(ends, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0 and not run.stdout and "terminate" not in run.stderr, run.stdout + run.stderr
