"""Files of a run that are not what was written: named in one line, put aside when asked, made again."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch

from flatprune import runs
from flatprune.checkpoint import CHECKPOINT_VERSION
from flatprune.errors import DamagedError, InputError
from flatprune.files.finished import read_history
from flatprune.files.lock import locked
from flatprune.reporting.report import VALLEYS_FILE
from flatprune.runs.folder import RUN_FILES, WHOLE, check_run
from flatprune.settings import Settings
from tests.conftest import thorough

JSON_FILES = ("summary.json", "digests.json")


def refused(outcome, *words):
    assert outcome.code == 2 and outcome.err.count("\n") == 1, outcome
    for word in words:
        assert word in outcome.err


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def tensors(folder):
    return torch.load(folder / "model.pt", weights_only=True)["state_dict"]


def unfinish(folder):
    """As a run that was killed after its last epoch."""
    for name in ("summary.json", "digests.json", "model.pt", "report.html", "progress.png"):
        (folder / name).unlink()


@pytest.mark.parametrize("damage", [cut, flip])
@pytest.mark.parametrize("name", ["summary.json", "digests.json", "model.pt"])
def test_eval_and_export_refuse(flatprune, folder, name, damage):
    damage(folder / name)
    refused(flatprune("eval", folder), name)
    if name == "model.pt":
        refused(flatprune("export", folder, "--to", "safetensors"), name)
        assert not (folder / "model.safetensors").exists()


@pytest.mark.parametrize("name", JSON_FILES)
def test_resume_names_a_damaged_summary(flatprune, folder, name):
    before = tensors(folder)
    cut(folder / name)
    refused(flatprune("run", "--resume", "--out", folder), name, "--restart-damaged")
    outcome = flatprune("run", "--restart-damaged", "--out", folder)
    assert outcome.code == 0 and "summary.json.damaged" in outcome.err
    assert set(check_run(folder).values()) == {WHOLE, "put aside"}
    assert all(torch.equal(value, before[key]) for key, value in tensors(folder).items())


def test_the_network_of_another_run_is_noticed(flatprune, folder, tmp_path):
    runs.run(
        Settings(widths=(8, 6), epochs=1, train_size=120, batch_size=40, target_params=0.5, seed=7), tmp_path / "other"
    )
    shutil.copy(tmp_path / "other" / "model.pt", folder)
    refused(flatprune("eval", folder), "model.pt", "of another run")
    refused(flatprune("check", folder), "model.pt")
    unfinish(folder)
    shutil.copy(tmp_path / "other" / "checkpoint.pt", folder)
    refused(flatprune("run", "--resume", "--out", folder), "checkpoint.pt", "another run than settings.json")


_MADE_AGAIN = ["history.jsonl", "model.pt", "report.html", "settings.json", "progress.png"]


_DAMAGES = [(damage, name) for damage in (cut, Path.unlink) for name in _MADE_AGAIN]


@pytest.mark.parametrize(
    ("damage", "name"), thorough(_DAMAGES, but=[(cut, "history.jsonl"), (Path.unlink, "model.pt")])
)
def test_resume_makes_again_what_the_checkpoint_knows(flatprune, folder, name, damage):
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    damage(folder / name)
    outcome = flatprune("run", "--resume", "--out", folder)
    assert outcome.code == 0 and f"{name}: " in outcome.err and "made again from checkpoint.pt" in outcome.err
    assert "finished already" not in outcome.out
    assert set(check_run(folder).values()) == {WHOLE}
    for same in ("history.jsonl", "settings.json"):
        assert (folder / same).read_bytes() == before[same]
    assert flatprune("run", "--resume", "--out", folder).err == ""


def test_what_the_checkpoint_knew_is_lost_with_it(flatprune, folder):
    (folder / "checkpoint.pt").unlink()
    assert flatprune("run", "--resume", "--out", folder).code == 0  # finished, and all else is whole
    cut(folder / "history.jsonl")
    refused(flatprune("run", "--resume", "--out", folder), "history.jsonl", "no checkpoint.pt")


@pytest.mark.parametrize("damage", thorough([cut, flip, lambda path: path.write_bytes(b"PK half a file")], but=[flip]))
def test_a_damaged_checkpoint_is_put_aside_when_asked(flatprune, folder, damage):
    before = tensors(folder)
    unfinish(folder)
    damage(folder / "checkpoint.pt")
    damaged = (folder / "checkpoint.pt").read_bytes()
    for options in ([], ["--seed", 0]):
        refused(flatprune("run", "--resume", "--out", folder, *options), "checkpoint.pt: is damaged", "--restart-dam")
    assert (folder / "checkpoint.pt").read_bytes() == damaged
    refused(flatprune("run", "--restart-damaged", "--out", folder, "--seed", 5), "seed")
    outcome = flatprune("run", "--restart-damaged", "--out", folder)
    assert outcome.code == 0 and "checkpoint.pt.damaged" in outcome.err
    assert (folder / "checkpoint.pt.damaged").read_bytes() == damaged
    assert all(torch.equal(value, before[key]) for key, value in tensors(folder).items())


def test_a_checkpoint_that_is_gone(flatprune, folder):
    unfinish(folder)
    (folder / "checkpoint.pt").unlink()
    refused(flatprune("run", "--resume", "--out", folder), "no checkpoint.pt", "--restart-damaged")
    (folder / "settings.json").unlink()
    refused(flatprune("run", "--restart-damaged", "--out", folder), "settings.json: no such file")
    refused(flatprune("run", "--restart-damaged", "--overwrite", "--out", folder), "--overwrite", "one of them")


def test_a_checkpoint_that_fits_no_run_is_named(folder):
    from flatprune.checkpoint import load_checkpoint
    from flatprune.files.sealed import save_sealed

    unfinish(folder)
    state = load_checkpoint(folder / "checkpoint.pt")
    for change in ({"optimizer": {}}, {"rng": 3}, {"progress": None}, {"history": 5}):
        save_sealed(folder / "checkpoint.pt", {**state, **change})
        with pytest.raises(DamagedError, match=r"checkpoint.pt: is damaged"):
            runs.resume(folder)


def test_the_history_of_a_killed_run_is_completed(folder):
    records = read_history(folder / "history.jsonl")
    unfinish(folder)
    lines = (folder / "history.jsonl").read_text().splitlines(keepends=True)
    (folder / "history.jsonl").write_text("".join(lines[:-1]))  # killed between checkpoint and history
    runs.resume(folder)
    assert read_history(folder / "history.jsonl") == records


@pytest.mark.parametrize("name", RUN_FILES)
def test_check_finds_each_file(flatprune, folder, name):
    outcome = flatprune("check", folder)
    assert (outcome.code, outcome.err) == (0, "") and f"{name}: whole" in outcome.out
    (folder / f"{name}.tmp").write_bytes(b"half")
    assert flatprune("check", folder).code == 0
    flip(folder / name)
    refused(flatprune("check", folder), str(folder), name)
    dense = folder / "dense" / name
    if name == VALLEYS_FILE:  # where networks are compared alone
        assert not dense.exists()
        return
    shutil.copy(dense.with_name("history.jsonl"), folder / "history.jsonl")
    flip(dense)
    assert f"dense/{name}: " in flatprune("check", folder).out


def test_check_of_a_run_that_goes_on(flatprune, folder):
    unfinish(folder)
    assert flatprune("check", folder).code == 0
    (folder / "checkpoint.pt").unlink()
    refused(flatprune("check", folder), "checkpoint.pt")
    refused(flatprune("check", folder / "none"), "no such folder")
    (folder / "empty").mkdir()
    refused(flatprune("check", folder / "empty"), "holds no run")


@pytest.mark.parametrize("to", ["torch-export", "safetensors", "torch"])
def test_check_knows_exports(flatprune, folder, to):
    assert flatprune("export", folder, "--to", to).code == 0
    assert flatprune("check", folder).code == 0
    for path in {"torch-export": ["model.pt2"], "torch": ["network.py", "network_weights.pt"]}.get(
        to, ["model.safetensors"]
    ):
        whole = (folder / path).read_bytes()
        flip(folder / path)
        refused(flatprune("check", folder), path)
        (folder / path).write_bytes(whole)


def test_exported_code_notices_damaged_weights(flatprune, folder):
    assert flatprune("export", folder, "--to", "torch").code == 0
    flip(folder / "network_weights.pt")
    space = {"__name__": "network", "__file__": str(folder / "network.py")}
    exec(compile((folder / "network.py").read_text(), "network.py", "exec"), space)
    with pytest.raises(ValueError, match=r"network_weights.pt: is damaged"):
        space["load"]()


def test_two_runs_in_one_folder_refuse_each_other(flatprune, folder):
    with locked(folder):
        start = time.monotonic()
        for options in (["--resume"], ["--overwrite"], ["--restart-damaged"]):
            refused(flatprune("run", *options, "--out", folder), str(folder), "in use by process")
        refused(flatprune("export", folder, "--to", "safetensors"), "in use by process")
        assert flatprune("export", folder, "--to", "safetensors", "--out", folder.parent / "a.safetensors").code == 0
        assert time.monotonic() - start < 30
    assert json.loads((folder / "summary.json").read_text())["seed"] == 0


def test_earlier_formats_are_refused_by_number(folder):
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    unfinish(folder)
    torch.save({**state, "version": 1}, folder / "checkpoint.pt")
    with pytest.raises(InputError, match=f"flatprune-checkpoint version 1, this package reads {CHECKPOINT_VERSION}"):
        runs.resume(folder)
