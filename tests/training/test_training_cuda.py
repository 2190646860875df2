"""The training loop as only a GPU can show it: no step waits, half precision, the run's files."""

from __future__ import annotations

import json

import pytest
import torch

import kfac_ext
from flatprune.data import load_dataset
from flatprune.settings import Settings
from flatprune.training.trainer import Trainer

READY = torch.cuda.is_available() and bool(kfac_ext.build_info()["cuda_architectures"])
pytestmark = pytest.mark.skipif(
    not READY, reason="no CUDA device" if not torch.cuda.is_available() else "no CUDA kernels in this build"
)

RUNS = [
    ("--amp", "bf16", "--channels-last"),
    ("--amp", "fp16", "--channels-last", "--optimizer", "adamw", "--ema", 0.9),
    ("--mixup", 0.4, "--label-smoothing", 0.1, "--augment", "--accumulate", 2),
    ("--flatness", "sam", "--disout", 0.1, "--amp", "fp16"),
    ("--flatness", "msam", "--optimizer", "adam", "--compile"),
]


@pytest.mark.parametrize("options", RUNS, ids=lambda options: " ".join(map(str, options)))
def test_a_run(flatprune, npz, tmp_path, options):
    out = tmp_path / "out"
    given = ("--epochs", 20, "--batch-size", 32, "--target-params", 0.3, "--model", "resnet20", "--device", "cuda")
    outcome = flatprune("run", "--data", npz(), "--out", out, *given, *options)
    assert (outcome.code, outcome.err) == (0, "")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["params_after"] <= 1.01 * 0.3 * summary["params_before"]
    assert summary["test_accuracy_last"] > 60.0
    assert flatprune("eval", out).code == 0  # on the CPU


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"augment": True, "amp": "bf16", "channels_last": True},
        {"optimizer": "adamw", "ema": 0.9, "mixup": 0.4, "label_smoothing": 0.1},
        {"amp": "fp16", "accumulate": 2, "flatness": "sam", "disout": 0.1},
        {"flatness": "msam", "optimizer": "adam"},
    ],
)
def test_no_step_waits(npz, options):
    data = str(npz())
    settings = Settings(
        data=data, batch_size=16, epochs=10, model="convnet", device="cuda", prune_start=0.9, prune_end=0.9, **options
    )
    trainer = Trainer(settings, load_dataset(data, device="cuda"))
    step = trainer._train_step

    def watched(index):
        busy = trainer.progress.step < 12 or trainer.progress.step == 53  # kernels are loaded; neurons go
        torch.cuda.set_sync_debug_mode("default" if busy else "error")
        try:
            return step(index)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    trainer._train_step = watched
    trainer.train()
    assert trainer.progress.step == 60


def test_a_checkpoint_goes_from_device_to_device(npz, tmp_path):
    data = str(npz())
    values = {"data": data, "batch_size": 16, "epochs": 2, "optimizer": "adamw", "amp": "bf16", "ema": 0.9}
    first = Trainer(Settings(**values, device="cuda"), load_dataset(data, device="cuda"))
    first.train()
    torch.save(first.state(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", map_location="cpu", weights_only=True)
    state["progress"]["epoch"] = 1
    second = Trainer(Settings(**values), load_dataset(data), state)
    second.train()
    assert second.progress.step == 18
    back = second.state()
    back["progress"]["epoch"] = 1
    Trainer(Settings(**values, device="cuda"), load_dataset(data, device="cuda"), back).train()
