"""One training in this process: `python -m bench.rivals.one_run FOLDER DATA_DIR RUN`, RUN being JSON.

Its outcome is a file of the folder: the figures, or "diverged" or "failed" with the reason. Exit code 3: the code is no
longer that of the folder.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.rivals.method import all_methods
from bench.rivals.plan import Folder, Run, code_digest, task_of
from bench.rivals.tasks import TARGETS
from bench.rivals.training import Training, reset_peak_rss, rss_mib
from flatprune import take_tensors
from flatprune.data import Dataset
from flatprune.errors import DivergedError

OTHER_CODE = 3


def outcome(run: Run, data: Dataset, shape: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train and measure.

    Args:
        run: what to train.
        data: of its seed.
        shape: for a method that trains the shape of another: tensors and attributes of that network.

    Returns:
        The outcome; and tensors and attributes of the final network, empty where it is of no other run's use.
    """
    method = all_methods()[run.method](run.value)
    unit, fraction = TARGETS.get(run.target, ("params", 1.0))
    model = None if shape is None else fresh_network_of(task_of(run).network(data), shape, run.seed)
    training = Training(task_of(run), data, method, unit, fraction, run.seed, model)
    reset_peak_rss()
    before = rss_mib("VmRSS")
    try:
        spent = training.train()
        memory = {"rss_before": before, "rss_peak": rss_mib("VmHWM")}
        found = {"status": "ended", **training.figures(), **spent, **memory}
    except DivergedError as error:
        return {"status": "diverged", "reason": str(error)}, {}
    except Exception as error:  # a library's own, on a network or at a size that it cannot do
        traceback.print_exc()
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}"}, {}
    if training.attributes is None:
        return found, {}
    return found, {"tensors": training.model.state_dict(), "attributes": training.attributes}


def fresh_network_of(network: nn.Module, shape: dict[str, Any], seed: int) -> nn.Module:
    """A network in the shape of another, its weights drawn anew by each layer's own rule."""
    take_tensors(network, shape["tensors"], attributes=shape["attributes"])
    torch.manual_seed(seed)
    for module in network.modules():
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
    return network


def main() -> int:
    folder, data_dir = Folder(Path(sys.argv[1]), None), Path(sys.argv[2])
    run = Run(**json.loads(sys.argv[3]))
    if code_digest() != folder.stamp["code"]:
        print(f"{folder.path}: was made with other code", file=sys.stderr)
        return OTHER_CODE
    torch.set_num_threads(1)
    needed = shape_run(run)
    shape = None if needed is None else torch.load(folder.network(needed), weights_only=True)
    data = task_of(run).data(data_dir, run.seed, validation=run.validation)
    found, network = outcome(run, data, shape)
    if network:
        torch.save(network, folder.network(run))
    folder.keep(run, found)
    return 0


def shape_run(run: Run) -> Run | None:
    """The run whose shape this one trains: recommended settings, same target, seed and images; None for most."""
    known = all_methods()
    name = known[run.method].shape_of
    if name is None:
        return None
    return Run(run.task, run.target, name, known[name].knob.recommended, run.seed, run.validation)


if __name__ == "__main__":
    sys.exit(main())
