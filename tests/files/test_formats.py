"""A run that was saved in today's formats can be read tomorrow; nothing that is read runs code."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import flatprune
from flatprune import runs
from flatprune.checkpoint import CHECKPOINT_FORMAT, CHECKPOINT_VERSION, load_checkpoint
from flatprune.errors import InputError
from flatprune.export.model_file import MODEL_FORMAT, MODEL_VERSION
from flatprune.export.subject import DESCRIPTION_KEY, DESCRIPTION_VERSION
from flatprune.files.finished import DIGESTS, HISTORY, SUMMARY, read_history
from flatprune.files.sealed import save_sealed
from flatprune.runs.folder import FINE, SETTINGS, check_run
from flatprune.study import read_study
from tests.files.make_formats import FOLDER, KEPT, images


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(FOLDER, tmp_path / "run"))


@pytest.mark.parametrize("name", ["", "model.pt", "model.safetensors"])
def test_the_network_computes_what_it_did(name):
    expected = torch.tensor(json.loads((FOLDER / "logits.json").read_text()))
    assert torch.allclose(flatprune.load(FOLDER / name)(images()), expected, atol=1e-6)


def test_all_files_are_whole_and_small(folder):
    assert set(check_run(folder).values()) <= set(FINE)
    assert sum((FOLDER / name).stat().st_size for name in KEPT) < 60_000


def test_the_run_can_be_resumed(folder):
    whole = read_history(folder / "history.jsonl")
    assert runs.resume(folder)["epochs"] == 2
    for name in ("summary.json", "digests.json", "history.jsonl", "model.pt"):
        (folder / name).unlink()
    runs.resume(folder)
    assert read_history(folder / "history.jsonl") == whole


def test_versions_are_those_of_the_files():
    """A version that changes needs files of its own: `python -m tests.files.make_formats`."""
    state = torch.load(FOLDER / "checkpoint.pt", weights_only=True)
    assert (state["format"], state["version"]) == (CHECKPOINT_FORMAT, CHECKPOINT_VERSION)
    state = torch.load(FOLDER / "model.pt", weights_only=True)
    assert (state["format"], state["version"]) == (MODEL_FORMAT, MODEL_VERSION)
    kinds = {"summary": SUMMARY, "digests": DIGESTS, "settings": SETTINGS}
    for name, kind in kinds.items():
        found = json.loads((FOLDER / f"{name}.json").read_text())
        assert (found["format"], found["version"]) == kind
    head = json.loads((FOLDER / "history.jsonl").read_text().splitlines()[0])
    assert (head["format"], head["version"]) == HISTORY


class Payload:
    """Makes a folder where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_no_file_runs_code(folder, tmp_path):
    ran = tmp_path / "ran"
    state = torch.load(folder / "model.pt", weights_only=True)
    for content in ({**state, "widths": Payload(ran)}, Payload(ran)):
        save_sealed(folder / "model.pt", content)
        with pytest.raises(InputError, match=r"model.pt: is damaged"):
            flatprune.load(folder / "model.pt")
        save_sealed(folder / "checkpoint.pt", content)
        with pytest.raises(InputError, match=r"checkpoint.pt: is damaged"):
            load_checkpoint(folder / "checkpoint.pt")
    (folder / "model.pt").write_bytes(pickle.dumps(Payload(ran)))
    with pytest.raises(InputError, match=r"model.pt: is damaged"):
        flatprune.load(folder / "model.pt")
    description = json.dumps(
        {"format": "flatprune-network", "version": DESCRIPTION_VERSION, "model": f"os.mkdir({ran})"}
    )
    save_file({"w": torch.zeros(1)}, folder / "model.safetensors", {DESCRIPTION_KEY: description})
    with pytest.raises(InputError, match=r"model.safetensors: is damaged"):
        flatprune.load(folder / "model.safetensors")
    (tmp_path / "study.yaml").write_text(f"base: !!python/object/apply:os.mkdir [{ran}]\n")
    with pytest.raises(InputError, match="line 1"):
        read_study(tmp_path / "study.yaml")
    assert not ran.exists()


def test_crafted_networks_are_one_line(folder):
    """Whole files, by their digest, whose content is none of this package's."""
    state = torch.load(folder / "model.pt", weights_only=True)
    tensors = state["state_dict"]
    name, first = next(iter(tensors.items()))
    changes = [
        {"model": {**state["model"], "name": "no such network"}},
        {"model": {**state["model"], "classes": "ten"}},
        {"model": {**state["model"], "image_shape": [1, 2]}},
        {"model": {}},
        {"widths": {}},
        {"widths": 3},
        {"normalization": {}},
        {"normalization": {**state["normalization"], "mean": torch.zeros(3)}},
        {"state_dict": {}},
        {"state_dict": {**tensors, name: first[:, :1].clone()}},
        {"state_dict": {**tensors, name: first.double()}},
        {"state_dict": {**tensors, name: 3}},
        {"state_dict": {**tensors, "more": first}},
    ]
    for change in changes:
        save_sealed(folder / "model.pt", {**state, **change})
        with pytest.raises(InputError, match=r"model.pt: ") as error:
            flatprune.load(folder / "model.pt")
        assert "\n" not in str(error.value), change
