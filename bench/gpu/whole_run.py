"""A whole `flatprune run` with default settings on random images: what of its time removals took.

python -m bench.gpu.whole_run NETWORK [--dry] --out FILE
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

import flatprune
from bench.documents import write_json
from bench.gpu.names import WHOLE_RUNS
from bench.gpu.run import step_arguments
from bench.gpu.training import images
from bench.results import Case

BATCH, EPOCHS = 128, 16
_KEPT = ("seconds", "removal_seconds", "steps", "params_before", "params_after", "macs_before", "macs_after")


def whole_run(network: str, device: str, quick: bool) -> Case:
    """Seconds of a run to a quarter of the parameters, and those of its removals."""
    size: int
    settings: dict[str, Any]
    size, settings = (8, {"widths": WHOLE_RUNS[network]}) if quick else (BATCH, {"amp": "bf16", "channels_last": True})
    with tempfile.TemporaryDirectory() as folder:
        data = images(Path(folder), 8 if quick else 32, 3, size, 4 if quick else 100)
        goal = {"data": str(data), "model": network, "target_params": 0.25, "epochs": 2 if quick else EPOCHS}
        chosen = flatprune.Settings(**goal, batch_size=size, device=device, **settings)
        summary = flatprune.run(chosen, Path(folder) / "out")
    found = {name: summary[name] for name in _KEPT}
    case = {"suite": "whole run", "name": network, "kind": "run", "unit": "s", "variants": {}, "network": network}
    return {**case, **found, "removal_share": found["removal_seconds"] / found["seconds"]}


def main() -> None:
    arguments = step_arguments(__doc__, WHOLE_RUNS)
    torch.manual_seed(0)
    found = whole_run(arguments.network, "cpu" if arguments.dry else "cuda", arguments.dry)
    write_json(arguments.out, {"cases": [found]})
    print(f"{found['seconds']:.1f} s, removals {100 * found['removal_share']:.1f} % of it")


if __name__ == "__main__":
    main()
