"""A run that was stopped and resumed ends exactly where one that was not stopped ends."""

from __future__ import annotations

import errno
import json
import os
import signal

import pytest
import torch

from flatprune import runs
from flatprune.errors import InputError, Interrupted
from flatprune.files.finished import read_history
from flatprune.reporting import report
from flatprune.settings import Settings
from flatprune.training.trainer import Observer, Trainer
from tests.conftest import thorough
from tests.training.acting import At

STEPS_PER_EPOCH = 6
SETTINGS = {"epochs": 10, "batch_size": 16, "target_params": 0.3, "seed": 4, "label_noise": 0.1, "augment": True}
WIDTHS = {"mlp": (24, 16), "convnet": (4, 4, 6, 6, 8, 8)}


def settings_of(data, model="mlp", **changes):
    return Settings(**{"data": data, "model": model, "widths": WIDTHS[model], **SETTINGS, **changes})


class Crash(Exception):  # noqa: N818
    pass


@pytest.fixture(autouse=True, scope="module")
def _without_figures():
    """Drawing takes longer than these runs, and test_run.py looks at the figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_report", lambda *_: None)
        yield


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def crash():
    raise Crash


def result(folder):
    summary = json.loads((folder / "summary.json").read_text())
    history = read_history(folder / "history.jsonl")
    for record in (summary, *history):
        for key in runs.TIMES:
            record.pop(key, None)
    return summary, history, torch.load(folder / "model.pt", weights_only=True)["state_dict"]


def assert_same(first, second):
    (summary, history, tensors), (other_summary, other_history, other_tensors) = result(first), result(second)
    assert summary == other_summary
    assert history == other_history
    assert tensors.keys() == other_tensors.keys()
    for name in tensors:
        assert torch.equal(tensors[name], other_tensors[name]), name


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    import numpy as np

    from tests.cli.small_images import image_arrays

    path = tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(path, **image_arrays())
    return str(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """Model name -> folder of a run that nobody interrupted."""
    folders = {}

    def make(model):
        if model not in folders:
            folders[model] = tmp_path_factory.mktemp("whole") / "out"
            runs.run(settings_of(data, model), folders[model])
        return folders[model]

    return make


@pytest.mark.parametrize(
    ("model", "stops"),
    [
        ("mlp", [1]),
        ("mlp", [3, 20]),  # in the warm-up of the flatness term, between two removals
        ("mlp", [STEPS_PER_EPOCH * 7]),
        pytest.param("convnet", [5, 21, 40], marks=pytest.mark.thorough),
    ],
)
def test_ctrl_c_and_resume(tmp_path, data, whole, model, stops):
    reference, out = whole(model), tmp_path / "out"
    with pytest.raises(Interrupted, match=f"stopped at step {stops[0]} of 60.*--resume"):
        runs.run(settings_of(data, model), out, observer=lambda _: At(stops[0], press_ctrl_c))
    for stop in stops[1:]:
        with pytest.raises(Interrupted, match=f"step {stop} of 60"):
            runs.resume(out, observer=lambda _, stop=stop: At(stop, press_ctrl_c))
    torch.manual_seed(999)
    runs.resume(out)
    assert_same(reference, out)


@pytest.mark.parametrize(
    ("options", "stop"),
    [
        ({"target_params": None, "target_macs": 0.3, "round_to": 2}, 20),
        ({"stop_accuracy_drop": 90.0}, 14),
        pytest.param(  # pruning ends at step 99
            {"stop_accuracy_drop": 1e-9, "lr": 0.7, "epochs": 60, "flatness": "off"}, 97, marks=pytest.mark.thorough
        ),
    ],
)
def test_other_targets_and_the_stopping_rule_resume_alike(tmp_path, data, options, stop):
    settings = settings_of(data, **options)
    runs.run(settings, tmp_path / "whole")
    out = tmp_path / "out"
    with pytest.raises(Interrupted, match=f"step {stop} of"):
        runs.run(settings, out, observer=lambda _: At(stop, press_ctrl_c))
    runs.resume(out)
    assert_same(tmp_path / "whole", out)
    stopped = [record["step"] for record in result(out)[1] if record["kind"] == "stop"]
    assert stopped == ([99] if settings.epochs == 60 else [])
    assert bool(result(out)[0]["pruning_stopped"]) == bool(stopped)


@pytest.mark.parametrize("step", [4, 15, 33])
def test_a_crash_goes_back_to_the_last_epoch(tmp_path, data, whole, step):
    out = tmp_path / "out"
    with pytest.raises(Crash):
        runs.run(settings_of(data), out, observer=lambda _: At(step, crash))
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert state["progress"]["step"] == step // STEPS_PER_EPOCH * STEPS_PER_EPOCH
    runs.resume(out)
    assert_same(whole("mlp"), out)


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, data, whole, monkeypatch, flatprune):
    out = tmp_path / "out"
    real, syncs = os.fsync, []

    def fsync(descriptor):
        syncs.append(descriptor)
        if len(syncs) == 4 * 3 + 3:  # each save syncs checkpoint, folder, history, folder, the first one settings too
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    options = ["--epochs", 10, "--batch-size", 16, "--target-params", 0.3, "--seed", 4, "--label-noise", 0.1]
    outcome = flatprune("run", "--data", data, "--widths", "24,16", "--out", out, *options, "--augment")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1 and "No space left" in outcome.err and "checkpoint.pt" in outcome.err
    assert torch.load(out / "checkpoint.pt", weights_only=True)["progress"]["epoch"] == 2
    monkeypatch.undo()
    outcome = flatprune("run", "--resume", "--out", out)
    assert (outcome.code, outcome.err) == (0, "")
    assert_same(whole("mlp"), out)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--flatness", "msam", "--sam-radius", 0.3], marks=pytest.mark.thorough),
        pytest.param(["--flatness", "on+msam", "--flatness-fade-below", 0], marks=pytest.mark.thorough),
        ["--flatness", "sam", "--disout", 0.2],
        pytest.param(
            ["--flatness-every", 2, "--disout", 0.2, "--optimum-shift", "after_pruning"], marks=pytest.mark.thorough
        ),
        ["--flatness-mode", "double_backward", "--flatness-strength", 0.1, "--flatness-fade-below", 0],
        ["--optimizer", "adamw", "--ema", 0.9, "--momentum", 0.8, "--optimum-shift", "after_pruning"],
        pytest.param(["--mixup", 0.4, "--label-smoothing", 0.1], marks=pytest.mark.thorough),
        pytest.param(["--accumulate", 4, "--optimizer", "adam", "--weight-decay", 1e-4], marks=pytest.mark.thorough),
        pytest.param(["--amp", "bf16", "--channels-last"], marks=pytest.mark.thorough),
        ["--amp", "fp16", "--ema", 0.9, "--flatness", "sam", "--accumulate", 2],
    ],
    ids=lambda options: f"{options[0]} {options[1]}",
)
@pytest.mark.parametrize("model", thorough(["mlp", "convnet"], but=["mlp"]))
def test_every_way_to_train_resumes(tmp_path, data, whole, flatprune, options, model):
    given = [
        "run", "--data", data, "--model", model, "--widths", ",".join(map(str, WIDTHS[model])), "--epochs", 10,
        "--batch-size", 16, "--target-params", 0.3, "--seed", 4, "--label-noise", 0.1, "--augment",
        *options, "--out",
    ]  # fmt: skip
    assert flatprune(*given, tmp_path / "whole").code == 0
    with pytest.MonkeyPatch.context() as patch:
        stops = iter([7, 31])  # before the removals, after the last one
        patch.setattr(Trainer, "_train_step", stopping_at(next(stops)))
        assert flatprune(*given, tmp_path / "out").code == 130
        patch.undo()
        patch.setattr(Trainer, "_train_step", stopping_at(next(stops)))
        torch.manual_seed(999)
        assert flatprune("run", "--resume", "--out", tmp_path / "out").code == 130
    assert flatprune("run", "--resume", "--out", tmp_path / "out").code == 0
    assert_same(tmp_path / "whole", tmp_path / "out")
    with pytest.raises(AssertionError):  # the options count for something
        assert_same(whole(model), tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_run_resumes(tmp_path, data, monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: real(model, backend="aot_eager"))
    settings = settings_of(data, compile=True)
    runs.run(settings, tmp_path / "whole")
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        runs.run(settings, out, observer=lambda _: At(17, press_ctrl_c))
    torch.compiler.reset()  # as in a new process
    runs.resume(out)
    assert_same(tmp_path / "whole", out)


def stopping_at(step):
    """`Trainer._train_step` with a Ctrl-C in one step."""
    real = Trainer._train_step

    def train_step(trainer, index):
        if trainer.progress.step + 1 == step:
            press_ctrl_c()
        return real(trainer, index)

    return train_step


@pytest.mark.parametrize("part", ["dense", "pruned"])
def test_stopped_beside_the_dense_network(tmp_path, data, part):
    settings = settings_of(data, compare_dense=True)
    runs.run(settings, tmp_path / "whole")
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        runs.run(settings, out, observer=lambda title: At(31, press_ctrl_c) if title == part else Observer())
    assert (out / "dense" / "summary.json").exists() == (part == "pruned")
    runs.resume(out)
    assert_same(tmp_path / "whole", out)
    assert_same(tmp_path / "whole" / "dense", out / "dense")


def test_comparing_with_the_dense_network_changes_nothing(tmp_path, data, whole):
    runs.run(settings_of(data, compare_dense=True), tmp_path / "out")
    _, history, tensors = result(tmp_path / "out")
    _, expected_history, expected_tensors = result(whole("mlp"))
    assert history == expected_history
    assert all(torch.equal(tensors[name], expected_tensors[name]) for name in tensors)


def test_the_same_seed_gives_the_same_run(tmp_path, data, whole):
    runs.run(settings_of(data), tmp_path / "out")
    assert_same(whole("mlp"), tmp_path / "out")


def test_resuming_a_finished_run_changes_nothing(whole, flatprune):
    folder = whole("mlp")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    outcome = flatprune("run", "--resume", "--out", folder)
    assert outcome.code == 0 and "finished already" in outcome.out
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_other_settings_or_data_are_refused(tmp_path, data, flatprune):
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        runs.run(settings_of(data), out, observer=lambda _: At(8, press_ctrl_c))
    before = {path: path.read_bytes() for path in out.iterdir()}
    for option, value, word in (("--epochs", 20, "epochs"), ("--model", "convnet", "model"), ("--seed", 5, "seed")):
        outcome = flatprune("run", "--resume", "--out", out, option, value)
        assert outcome.code == 2 and word in outcome.err and outcome.err.count("\n") == 1
    outcome = flatprune("run", "--resume", "--out", out, "--data", "digits")
    assert outcome.code == 2 and "digits: not the data of the checkpoint" in outcome.err
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(InputError, match="no checkpoint"):
        runs.resume(tmp_path / "elsewhere")
    assert flatprune("run", "--resume", "--out", out, "--epochs", 10, "--data", data).code == 0
