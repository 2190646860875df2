"""From the command line to the files in the folder of the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import flatprune as package
from flatprune.files.finished import HISTORY_FILE, SUMMARY_FILE, read_history
from flatprune.files.lock import LOCK_FILE
from flatprune.models import layer_widths, multiply_accumulates, parameter_count
from flatprune.reporting.report import VALLEYS_FILE
from flatprune.runs.folder import RUN_FILES
from tests.cli.small_images import image_arrays

REQUIRED = [
    *("data", "model", "seed", "epochs", "params_before", "params_after", "macs_before", "macs_after"),
    *("test_accuracy_last", "test_accuracy_best", "train_accuracy_last", "spectral_radius_kfac", "hessian_lambda_max"),
    *("widths_before", "widths_after", "seconds"),
]


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """Two epochs on the digits, beside the dense network and one without the flatness term; returns the folder."""
    from flatprune.cli import main

    folder = tmp_path_factory.mktemp("run") / "out"
    options = ["--epochs", "2", "--target-params", "0.3", "--seed", "3", "--measure-latency"]
    assert main(["run", *options, "--compare-dense", "--compare-no-flatness", "--out", str(folder)]) == 0
    return folder


def summary_of(folder):
    return json.loads((folder / SUMMARY_FILE).read_text())


def test_files(digits_run):
    assert {path.name for path in digits_run.iterdir()} == {*RUN_FILES, LOCK_FILE, "dense", "no-flatness"}
    for inside in ("dense", "no-flatness"):
        assert {path.name for path in (digits_run / inside).iterdir()} == {*RUN_FILES, LOCK_FILE} - {VALLEYS_FILE}
    assert (digits_run / "progress.png").read_bytes().startswith(b"\x89PNG")


def test_summary(digits_run):
    summary = summary_of(digits_run)
    assert not [key for key in REQUIRED if key not in summary]
    assert summary["params_before"] == 17_226
    assert summary["params_after"] <= 1.01 * 0.3 * summary["params_before"]
    assert summary["macs_after"] < summary["macs_before"] == 64 * 128 + 128 * 64 + 64 * 10
    assert (summary["data"], summary["model"], summary["seed"], summary["epochs"]) == ("digits", "mlp", 3, 2)
    assert 10.0 < summary["test_accuracy_last"] <= summary["test_accuracy_best"] <= 100.0  # percent
    assert summary["spectral_radius_kfac"] > 0 and summary["hessian_lambda_max"] > 0
    assert list(summary["widths_before"].values()) == [128, 64, 10]
    assert list(summary["widths_after"].values())[-1] == 10
    assert summary["versions"]["torch"] == torch.__version__


def test_no_flatness_beside(digits_run):
    summary, other = summary_of(digits_run), summary_of(digits_run / "no-flatness")
    assert other["settings"] == {
        **summary["settings"], "flatness": "off", "compare_dense": False, "compare_no_flatness": False
    }  # fmt: skip
    for key in ("test_accuracy_last", "hessian_lambda_max", "params_after", "latency_after_1"):
        assert summary[f"no_flatness_{key.replace('_after', '')}"] == other[key]
    valleys = summary["valleys"]
    middle = len(valleys["distances"]) // 2
    assert valleys["distances"][middle] == 0.0
    for name in ("dense", "no_flatness", "pruned"):
        losses = valleys[name]
        assert len(losses) == len(valleys["distances"]) and min(losses[0], losses[-1]) > losses[middle]


def test_dense_beside(digits_run):
    summary, dense = summary_of(digits_run), summary_of(digits_run / "dense")
    assert summary["dense_test_accuracy_last"] == dense["test_accuracy_last"]
    assert dense["params_after"] == dense["params_before"] == summary["params_before"]


def test_history(digits_run):
    records = [json.loads(line) for line in (digits_run / HISTORY_FILE).read_text().splitlines()]
    epochs = [record for record in records if record["kind"] == "epoch"]
    removals = [record for record in records if record["kind"] == "removal"]
    assert [record["epoch"] for record in epochs] == [1, 2]
    assert removals and all(record["layer"] in ("1", "3") for record in removals)
    summary = summary_of(digits_run)
    assert epochs[-1]["test_accuracy"] == summary["test_accuracy_last"]
    assert epochs[-1]["params"] == summary["params_after"]
    assert epochs[-1]["spectral_radius"] == summary["spectral_radius_kfac"]


def test_loads_back(digits_run):
    summary, model = summary_of(digits_run), package.load(digits_run)
    assert parameter_count(model) == summary["params_after"]
    assert layer_widths(model) == summary["widths_after"]
    assert multiply_accumulates(model, torch.zeros(1, *model.image_shape)) == summary["macs_after"]
    first = model[1]
    assert first.out_features == first.weight.shape[0] == summary["widths_after"]["1"]
    digits = package.Settings().dataset()
    accuracy = 100.0 * float((model(digits.x_test).argmax(1) == digits.y_test).double().mean())
    assert accuracy == pytest.approx(summary["test_accuracy_last"], abs=1e-9)


def test_model_file_is_plain(digits_run):
    state = torch.load(digits_run / "model.pt", weights_only=True)
    assert (state["format"], state["version"]) == ("flatprune-model", 2)
    assert state["model"] == {"name": "mlp", "image_shape": [1, 8, 8], "classes": 10, "widths": None}
    assert state["widths"] == summary_of(digits_run)["widths_after"]
    torch.load(digits_run / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("options", [(), ("--data", "digits")])
def test_eval_prints_the_accuracy_of_the_summary(flatprune, digits_run, options):
    outcome = flatprune("eval", digits_run, *options)
    assert (outcome.code, outcome.err) == (0, "")
    assert f" {summary_of(digits_run)['test_accuracy_last']!r} %" in outcome.out


def test_eval_on_other_images(flatprune, digits_run, npz):
    outcome = flatprune("eval", digits_run, "--data", npz(shape=(9, 9, 1)))
    assert outcome.code == 2 and "9x9x1" in outcome.err and outcome.err.count("\n") == 1
    outcome = flatprune("eval", digits_run, "--data", npz(shape=(8, 8, 3)))
    assert outcome.code == 2 and "3 channels" in outcome.err
    assert flatprune("eval", digits_run, "--data", npz()).code == 0


def test_report_stands_alone(digits_run):
    page = (digits_run / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page and 'src="data' in page
    assert f"{summary_of(digits_run)['params_after']:,}" in page


def test_a_folder_with_a_run_is_left_alone(flatprune, digits_run):
    before = {path: path.read_bytes() for path in digits_run.rglob("*") if path.is_file()}
    outcome = flatprune("run", "--epochs", 1, "--out", digits_run)
    assert outcome.code == 2 and "--overwrite" in outcome.err and outcome.err.count("\n") == 1
    # nor is it touched by a mistake in an overwriting command
    assert flatprune("run", "--epochs", 1, "--out", digits_run, "--overwrite", "--train-size", 10**6).code == 2
    assert {path: path.read_bytes() for path in digits_run.rglob("*") if path.is_file()} == before


def test_overwrite_replaces_the_run_and_nothing_else(flatprune, npz, tmp_path):
    out = tmp_path / "out"
    command = ("run", "--data", npz(), "--out", out, "--epochs", 1, "--batch-size", 32, "--target-params", 0.5)
    assert flatprune(*command, "--compare-dense").code == 0
    (out / "notes.txt").write_text("mine")
    assert flatprune(*command, "--overwrite", "--seed", 1).code == 0
    assert summary_of(out)["seed"] == 1
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "dense" / "summary.json").exists()


@pytest.mark.parametrize(
    ("model", "widths"),
    [
        ("convnet", "8,8,12,12,16,16"),
        pytest.param("lenet5", "6,16,40,24", marks=pytest.mark.thorough),
        pytest.param("resnet20", "8,8,8", marks=pytest.mark.thorough),
    ],
)
def test_convolutional_networks(flatprune, npz, tmp_path, model, widths):
    out = tmp_path / "out"
    options = ("--epochs", 2, "--batch-size", 32, "--target-params", 0.5, "--label-noise", 0.1, "--augment")
    outcome = flatprune("run", "--data", npz(), "--model", model, "--widths", widths, "--out", out, *options)
    assert (outcome.code, outcome.err) == (0, "")
    summary = summary_of(out)
    assert summary["params_after"] <= 1.01 * 0.5 * summary["params_before"]
    assert f" {summary['test_accuracy_last']!r} %" in flatprune("eval", out).out


VARIANTS = [
    ("--flatness", "off"),
    ("--flatness", "sam", "--sam-radius", 0.4, "--sam-every", 4),
    ("--criterion", "l1"),
    ("--criterion", "l1_uniform"),
    ("--target-params", 1),
]


@pytest.mark.parametrize("options", VARIANTS)
def test_variants(flatprune, npz, tmp_path, options):
    out = tmp_path / "out"
    outcome = flatprune("run", "--data", npz(), "--out", out, "--epochs", 2, "--batch-size", 32, *options)
    assert (outcome.code, outcome.err) == (0, "")
    summary = summary_of(out)
    assert summary["params_after"] <= 1.01 * summary["target_params"] * summary["params_before"]


def test_other_units(flatprune, npz, tmp_path):
    for unit, fraction in (("macs", 0.4), ("neurons", 0.5), ("latency", 0.9)):
        out = tmp_path / unit
        options = ("--epochs", 2, "--batch-size", 32, f"--target-{unit}", fraction)
        outcome = flatprune("run", "--data", npz(), "--out", out, *options)
        assert outcome.code == 0
        summary = summary_of(out)
        assert (summary["target_unit"], summary["target_fraction"], summary["target_params"]) == (unit, fraction, None)
        if unit == "latency":
            assert summary["cost_before"] > 0.0 and summary["cost_after"] > 0.0  # really timed: no bound is certain
            continue
        assert summary["cost_after"] <= 1.01 * fraction * summary["cost_before"]
        if unit == "macs":
            assert summary["cost_after"] == summary["macs_after"]
            assert summary["cost_before"] == summary["macs_before"]


def test_widths_and_limits(flatprune, npz, tmp_path):
    out = tmp_path / "out"
    options = ("--epochs", 2, "--batch-size", 32, "--target-params", 0.3, "--round-to", 8, "--min-width", 12)
    assert flatprune("run", "--data", npz(), "--out", out, *options).code == 0
    assert all(width % 8 == 0 and width >= 16 for width in list(summary_of(out)["widths_after"].values())[:-1])


def test_tied_widths_stay_equal(flatprune, npz, tmp_path):
    out = tmp_path / "out"
    options = ("--epochs", 2, "--batch-size", 32, "--target-params", 0.4, "--tie-widths", "--widths", "8,8,12")
    assert flatprune("run", "--data", npz(), "--model", "resnet20", "--out", out, *options).code == 0
    summary = summary_of(out)
    blocks = [f"stages.2.{block}.conv1" for block in range(3)]
    assert {summary["widths_before"][name] for name in blocks} == {12}
    (width,) = {summary["widths_after"][name] for name in blocks}
    assert width < 12


def test_removal_events_are_recorded_and_shown(flatprune, npz, tmp_path):
    out = tmp_path / "out"
    options = ("--epochs", 80, "--batch-size", 32, "--target-macs", 0.2)
    outcome = flatprune("run", "--data", npz(), "--out", out, *options)
    history = read_history(out / HISTORY_FILE)
    cuts = {(r["step"], r["round"]): r for r in history if r["kind"] == "removal"}
    assert len(cuts) >= 3
    for record in cuts.values():
        assert record["unit"] == "macs" and record["cost_after"] < record["cost_before"]
        assert record["predicted_change"] >= 0.0 and record["measured_change"] >= 0.0
        assert record["lowest_removed"] <= record["highest_removed"] and record["neuron_cost"] > 0
    found = summary_of(out)["predicted_vs_measured"]
    assert found["cuts"] == len(cuts)
    x, y = ([record[key] for record in cuts.values()] for key in ("predicted_change", "measured_change"))
    assert found["pearson"] == pytest.approx(float(np.corrcoef(x, y)[0, 1]))
    assert f"predicted and measured: {len(cuts)} cuts" in outcome.out
    page = (out / "report.html").read_text()
    assert (
        "Predicted and measured changes of the loss" in page
        and "Removal events" in page
        and f"Spearman {found['spearman']:.2f}" in page
    )


def test_what_an_event_leaves_undone_is_said(flatprune, npz, tmp_path):
    out = tmp_path / "out"
    options = ("--epochs", 50, "--batch-size", 32, "--target-params", 0.3, "--max-predicted-loss", 1e-30)
    outcome = flatprune("run", "--data", npz(), "--out", out, *options)
    assert outcome.code == 0
    events = [r for r in read_history(out / HISTORY_FILE) if r["kind"] == "event"]
    assert events
    for record in events:
        assert "nothing removed: max_predicted_loss=1e-30 ended the event" in record["note"]
        assert f"step {record['step']}: {record['note']}" in outcome.out
        assert record["note"] in (out / "report.html").read_text()
    assert "max_predicted_loss" in outcome.err  # the target is missed, a warning


def test_plain_lines_when_not_a_terminal(flatprune, npz, tmp_path):
    outcome = flatprune("run", "--data", npz(), "--out", tmp_path / "out", "--epochs", 3, "--batch-size", 32)
    lines = [line for line in outcome.out.splitlines() if line.startswith("epoch")]
    assert len(lines) == 3
    for word in ("loss", "train", "test", "parameters", "radius", "left"):
        assert all(word in line for line in lines)
    assert "\x1b" not in outcome.out and "\r" not in outcome.out


def test_a_loss_that_diverges_keeps_the_last_good_checkpoint(flatprune, npz, tmp_path):
    out = tmp_path / "out"
    outcome = flatprune("run", "--data", npz(), "--out", out, "--epochs", 5, "--batch-size", 32, "--lr", "1e30")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1 and "loss became" in outcome.err and str(out) in outcome.err
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert all(bool(tensor.isfinite().all()) for tensor in state["model"].values())
    assert not (out / "summary.json").exists()


@pytest.mark.thorough
def test_ctrl_c_leaves_a_checkpoint(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "flatprune", "run", "--epochs", "100000", "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if line.startswith("epoch"):
                break
        os.kill(process.pid, signal.SIGINT)
        process.stdout.read()
        error = process.stderr.read()
    assert process.returncode == 130
    assert error.count("\n") == 1 and f"--resume --out {out}" in error
    assert torch.load(out / "checkpoint.pt", weights_only=True)["progress"]["step"] > 0


def test_importing_is_quick():
    code = """
import sys, flatprune
assert 'torch' not in sys.modules
flatprune.load
assert not {'matplotlib', 'sklearn'} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError):
        package.no_such_name  # noqa: B018


def test_images_of_this_test_can_be_learned():
    assert set(image_arrays()["y_train"]) == {0, 1, 2, 3}
