"""`flatprune export`: from the folder of a run to files that others read, or to one line that says why not."""

from __future__ import annotations

import errno
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import flatprune as package
from flatprune.data import read_images
from flatprune.export import EXPORT_FILES, EXPORTS_FILE, FORMATS, exporting

ALWAYS_THERE = [name for name in FORMATS if name != "onnx"]
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript")),
    reason="onnx and onnxscript are not installed (the extra 'export')",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    from flatprune.cli import main

    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main(["run", "--epochs", "3", "--target-params", "0.3", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of a finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(outcome, *words):
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1), outcome
    for word in words:
        assert word in outcome.err


@pytest.mark.parametrize("to", [*ALWAYS_THERE, pytest.param("onnx", marks=needs_onnx)])
def test_writes_one_export_and_says_what_it_is(flatprune, folder, to):
    before = content(folder)
    outcome = flatprune("export", folder, "--to", to)
    assert (outcome.code, outcome.err) == (0, "")
    path = folder / FORMATS[to].file
    new = {folder / name for name in content(folder).keys() - before.keys()}
    assert new - {folder / EXPORTS_FILE} == ({path, folder / "network_weights.pt"} if to == "torch" else {path})
    assert {name: value for name, value in content(folder).items() if name in before} == before
    assert not [child for child in folder.iterdir() if child.is_dir()]
    size = sum(file.stat().st_size for file in new - {folder / EXPORTS_FILE})
    params = json.loads((folder / "summary.json").read_text())["params_after"]
    for word in (str(path), f"{size:,} bytes", f"{params:,} parameters", "float32 [n, 1, 8, 8]", "largest difference"):
        assert word in outcome.out


def test_pixels_go_in_and_the_accuracy_of_the_run_comes_out(flatprune, folder, tmp_path):
    out = tmp_path / "elsewhere.pt2"
    assert flatprune("export", folder, "--to", "torch-export", "--input", "float", "--out", out).code == 0
    digits = read_images("digits")
    logits = torch.export.load(out).module()(torch.from_numpy(digits.x_test))
    accuracy = (logits.argmax(1) == torch.from_numpy(digits.y_test)).double().mean().item() * 100
    assert accuracy == pytest.approx(json.loads((folder / "summary.json").read_text())["test_accuracy_last"])


def test_descriptions(flatprune, folder):
    for to in ALWAYS_THERE:
        assert flatprune("export", folder, "--to", to).code == 0
    extra = {"flatprune.json": ""}
    torch.export.load(folder / "model.pt2", extra_files=extra)
    with safe_open(folder / "model.safetensors", "pt") as file:
        description = json.loads(file.metadata()["flatprune"])
    assert json.loads(extra["flatprune.json"]) == description
    summary, model = json.loads((folder / "summary.json").read_text()), package.load(folder)
    assert description["widths"] == summary["widths_after"]
    assert description["params"] == summary["params_after"]
    assert description["model"]["name"] == "mlp"
    assert description["input"] == {"kind": "normalized", "dtype": "float32", "shape": [1, 8, 8]}
    assert description["normalization"]["mean"] == model.normalization.mean.tolist()


@needs_onnx
def test_onnx_needs_no_runtime_and_has_names(flatprune, folder, monkeypatch):
    import onnx

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert flatprune("export", folder, "--to", "onnx").code == 0
    model = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["images", "logits"]
    assert all(value.type.tensor_type.shape.dim[0].dim_param for value in (*model.graph.input, *model.graph.output))
    assert json.loads({entry.key: entry.value for entry in model.metadata_props}["flatprune"])["version"] == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--to", "tflite"], ["'tflite'", "onnx, torch-export, safetensors, torch"]),
        ([], ["--to"]),
        (["--to", "torch", "--input", "jpeg"], ["'jpeg'", "normalized, float, uint8"]),
        (["--to", "safetensors", "--input", "uint8"], ["uint8", "safetensors", "metadata"]),
        (["--to", "torch", "--out", "model.pt"], ["model.pt", "ends in .py"]),
        (["--to", "torch-export", "--out", "no/such/model.pt2"], ["model.pt2", "no folder no/such"]),
    ],
)
def test_what_cannot_be_used(flatprune, folder, options, words):
    before = content(folder)
    refused(flatprune("export", folder, *options), *words)
    assert content(folder) == before


def test_no_finished_run(flatprune, tmp_path):
    refused(flatprune("export", tmp_path / "none", "--to", "torch"), "none", "no such folder")
    refused(flatprune("export", tmp_path, "--to", "torch"), str(tmp_path), "no finished run", "model.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("there", ["network.py", "network_weights.pt", "model.safetensors"])
def test_replaces_only_when_told_to(flatprune, folder, there):
    (folder / there).write_text("mine")
    before = content(folder)
    to = "safetensors" if there.endswith("safetensors") else "torch"
    refused(flatprune("export", folder, "--to", to), there, "--overwrite")
    assert content(folder) == before
    assert flatprune("export", folder, "--to", to, "--overwrite").code == 0
    assert (folder / there).read_bytes() != b"mine"


def test_out_is_a_folder(flatprune, folder):
    (folder / "network.py").mkdir()
    refused(flatprune("export", folder, "--to", "torch", "--overwrite"), "network.py", "is a folder")


def test_a_missing_package_names_the_extra(flatprune, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    before = content(folder)
    refused(flatprune("export", folder, "--to", "onnx"), "needs onnx", "kfac-ext[export]")
    assert content(folder) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda outputs: outputs * 1.001, ["outputs differ"]),
        (lambda outputs: outputs * float("nan"), ["outputs differ by nan"]),
        (lambda outputs: outputs[:1], ["5 images", "(1, 10), not (5, 10)"]),
    ],
)
def test_other_outputs_are_an_error(flatprune, folder, monkeypatch, change, words):
    flatprune("export", folder, "--to", "safetensors")
    before = content(folder)
    kind = FORMATS["safetensors"]
    changed = kind._replace(reopen=lambda path: lambda images: change(kind.reopen(path)(images)))
    monkeypatch.setitem(FORMATS, "safetensors", changed)
    refused(flatprune("export", folder, "--to", "safetensors", "--overwrite"), "to safetensors", *words)
    assert content(folder) == before


@pytest.mark.parametrize("to", ALWAYS_THERE)
def test_a_full_disk_keeps_what_was_there(flatprune, folder, monkeypatch, to):
    flatprune("export", folder, "--to", to)
    before = content(folder)

    def full(path, *_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    refused(flatprune("export", folder, "--to", to, "--overwrite"), FORMATS[to].file, "No space left")
    assert content(folder) == before
    assert not list(folder.glob("*.tmp"))


def test_a_failing_exporter_is_one_line(flatprune, folder, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no such operator\nand much more")

    monkeypatch.setattr(exporting.program_file.torch.export, "export", fail)
    refused(flatprune("export", folder, "--to", "torch-export"), "torch-export", "no such operator")
    assert not (folder / "model.pt2").exists()


def test_what_a_killed_export_left_does_not_matter(flatprune, folder):
    (folder / "model.safetensors.tmp").mkdir()
    (folder / "model.safetensors.tmp" / "model.safetensors").write_text("half")
    assert flatprune("export", folder, "--to", "safetensors").code == 0
    assert not (folder / "model.safetensors.tmp").exists()


def test_a_new_run_removes_the_exports_of_the_old_one(flatprune, folder):
    for to in ALWAYS_THERE:
        assert flatprune("export", folder, "--to", to).code == 0
    assert sum((folder / name).exists() for name in EXPORT_FILES) == len(EXPORT_FILES) - 1
    assert flatprune("run", "--epochs", "1", "--target-params", "0.3", "--out", folder, "--overwrite").code == 0
    assert not any((folder / name).exists() for name in EXPORT_FILES)


def test_load_refuses_other_safetensors(folder, flatprune, tmp_path):
    path = tmp_path / "other.safetensors"
    for metadata in (None, {"flatprune": "{"}, {"flatprune": '{"format": "other"}'}):
        save_file({"weight": torch.zeros(2)}, path, metadata)
        with pytest.raises(package.InputError, match=r"other.safetensors: its metadata does not describe"):
            package.load(path)
    save_file({"weight": torch.zeros(2)}, path, {"flatprune": '{"format": "flatprune-network", "version": 1}'})
    with pytest.raises(package.InputError, match="version 1, this package reads 2"):
        package.load(path)
    with pytest.raises(package.InputError, match=r"none.safetensors: no such file"):
        package.load(tmp_path / "none.safetensors")
    flatprune("export", folder, "--to", "safetensors")
    path.write_bytes((folder / "model.safetensors").read_bytes()[:2000])
    with pytest.raises(package.InputError, match=r"other.safetensors: is damaged"):
        package.load(path)
