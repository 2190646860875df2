"""Runs small enough to be made and made again by the thousand, and what is compared of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from flatprune import runs
from flatprune.files.finished import HISTORY_FILE, read_history, read_summary
from flatprune.reporting import report
from flatprune.settings import Settings
from flatprune.study import report as study_report

SETTINGS = {
    "widths": (8, 6),
    "epochs": 3,
    "train_size": 120,
    "batch_size": 40,
    "target_params": 0.5,
    "prune_start": 0.2,
    "prune_end": 0.7,
    "prune_every": 1,
    "threads": 1,
}


def settings(**changes: Any) -> Settings:
    return Settings(**{**SETTINGS, **changes})


def without_report() -> None:
    """Leave the drawing out, which takes longer than all else."""
    report.write_report = lambda *_: None  # type: ignore[assignment]
    study_report.figure = lambda *_: None  # type: ignore[assignment]
    study_report.png = lambda *_: b"no picture"  # type: ignore[assignment]


def result(folder: Path) -> str:
    """The digest of what a finished run found: network, bit by bit, history and summary without seconds and traffic."""
    parts = [read_summary(folder), *read_history(folder / HISTORY_FILE)]
    for record in parts:
        for name in (*runs.TIMES, "traffic"):
            record.pop(name, None)
    state = torch.load(folder / "model.pt", weights_only=True)["state_dict"]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
