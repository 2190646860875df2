"""Makes `formats/`, a run in today's formats; for a version that changed: `python -m tests.files.make_formats`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

import flatprune
from flatprune import runs
from flatprune.export import export_run
from flatprune.reporting import report
from flatprune.settings import Settings

FOLDER = Path(__file__).parent / "formats"
SETTINGS = Settings(
    widths=(4, 3), image_size=2, epochs=2, train_size=40, batch_size=20, target_params=0.8, prune_every=1, threads=1
)
KEPT = (
    "checkpoint.pt",
    "settings.json",
    "history.jsonl",
    "model.pt",
    "digests.json",
    "summary.json",
    "model.safetensors",
)


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    report.write_report = lambda *_: None  # type: ignore[assignment]
    runs.run(SETTINGS, FOLDER)
    export_run(FOLDER, "safetensors")
    logits = flatprune.load(FOLDER)(images()).tolist()
    (FOLDER / "logits.json").write_text(json.dumps(logits) + "\n")
    for path in FOLDER.iterdir():
        if path.name not in (*KEPT, "logits.json"):
            path.unlink()


def images() -> torch.Tensor:
    """What the outputs are kept of."""
    return torch.linspace(-1.0, 1.0, 12).reshape(3, 1, 2, 2)


if __name__ == "__main__":
    main()
