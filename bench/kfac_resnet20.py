"""Steps and seconds that SGD and SGD with K-FAC need to bring ResNet-20 to a training loss, each tuned alike.

    python -m bench.kfac_resnet20 --data cifar10.npz --out runs/kfac.json

Both have a grid of equal size, run on seed 0 alone; what needs the fewest steps there is run on the other seeds too.
Each run is written to --out at once and not made again; use another file after a change to the code. Seconds are CPU
time of one thread: of the steps alone, and little disturbed by what else the machine does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import kfac_ext
from bench import documents
from flatprune import models
from flatprune.data import to_pixels

BATCH, MOMENTUM = 128, 0.9
UPDATE_STEPS = {"factor_update_steps": 5, "inv_update_steps": 10}
GRIDS: dict[str, list[dict[str, float]]] = {
    "SGD": [{"lr": lr} for lr in (0.005, 0.01, 0.02, 0.05)],
    "K-FAC": [
        {"lr": lr, "damping": damping, "kl_clip": clip}
        for lr, damping, clip in ((0.05, 0.01, 0.01), (0.05, 0.1, 0.01), (0.1, 0.1, 0.01), (0.1, 0.3, 0.1))
    ],
}


def load(path: Path, count: int, size: int) -> tuple[Tensor, Tensor]:
    """The first `count` training images, averaged to `size` x `size` and normalised, and their labels."""
    with np.load(path) as file:
        images, labels = file["x_train"][:count], file["y_train"][:count]
    pixels = to_pixels(images, size)
    std, mean = torch.std_mean(pixels, dim=(0, 2, 3), keepdim=True)
    return (pixels - mean) / std, torch.from_numpy(labels.astype(np.int64).ravel())


def batches(x: Tensor, y: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Whole batches, epoch after epoch, each in a new order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(x), generator=generator)
        for start in range(0, len(x) - BATCH + 1, BATCH):
            index = order[start : start + BATCH]
            yield x[index], y[index]


def train(x: Tensor, y: Tensor, options: dict[str, float], seed: int, target: float, max_steps: int) -> dict[str, Any]:
    """Train until the mean loss of the last epoch's steps is at most `target`; losses and CPU seconds of the steps."""
    torch.manual_seed(seed)
    model = models.build("resnet20", tuple(x.shape[1:]), 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=options["lr"], momentum=MOMENTUM)
    preconditioner = None
    if "damping" in options:
        preconditioner = kfac_ext.KFACPreconditioner(model, **options, **UPDATE_STEPS)  # type: ignore[arg-type]
    epoch, losses = len(x) // BATCH, []
    start = time.process_time()
    for images, labels in itertools.islice(batches(x, y, seed), max_steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        if preconditioner is not None:
            preconditioner.step()
        optimizer.step()
        losses.append(loss.item())
        recent = losses[-epoch:]
        if not np.isfinite(losses[-1]) or (len(recent) == epoch and statistics.fmean(recent) <= target):
            break
    return {"losses": losses, "seconds": time.process_time() - start, "epoch": epoch}


def steps_to(run: dict[str, Any], target: float) -> float:
    """Steps until the mean loss of an epoch's steps was at most `target`; inf if it never was."""
    losses, epoch = run["losses"], run["epoch"]
    for end in range(epoch, len(losses) + 1):
        if statistics.fmean(losses[end - epoch : end]) <= target:
            return end
    return float("inf")


class Runs:
    """The runs in a file, by method, options and seed; what is missing is made."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.runs: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        self.x, self.y = load(arguments.data, arguments.images, arguments.size)

    def get(self, method: str, options: dict[str, float], seed: int) -> dict[str, Any]:
        """The run, from the file or made now."""
        given = self.arguments
        key = json.dumps([method, options, seed, given.images, given.size, given.target, given.max_steps])
        if key not in self.runs:
            self.runs[key] = train(self.x, self.y, options, seed, given.target, given.max_steps)
            given.out.write_text(json.dumps(self.runs))
            last = self.runs[key]["losses"][-1]
            print(
                f"{method} {options} seed {seed}: {len(self.runs[key]['losses'])} steps, last loss {last:.2f}",
                flush=True,
            )
        return self.runs[key]

    def best(self, method: str) -> dict[str, float]:
        """The options of the grid that reach the target first on seed 0 (the lowest last loss, if none does)."""

        def rank(options: dict[str, float]) -> tuple[float, float]:
            run = self.get(method, options, 0)
            last = statistics.fmean(run["losses"][-run["epoch"] :])
            return steps_to(run, self.arguments.target), last if np.isfinite(last) else float("inf")

        return min(GRIDS[method], key=rank)


def table(runs: Runs) -> str:
    """Steps and CPU seconds to the target of both methods at their best options, and each seed's ratio of steps."""
    target = runs.arguments.target
    rows = []
    for method in GRIDS:
        options = runs.best(method)
        found = [runs.get(method, options, seed) for seed in runs.arguments.seeds]
        steps = ", ".join(f"{steps_to(run, target):g}" for run in found)
        per_step = statistics.fmean(run["seconds"] / len(run["losses"]) for run in found)
        seconds = ", ".join(f"{run['seconds']:.0f}" for run in found)
        chosen = ", ".join(f"{name} {value:g}" for name, value in options.items())
        rows.append((method, chosen, steps, f"{per_step:.2f}", seconds))
    head = "", "options", "steps, one seed each", "CPU s a step", "CPU s"
    return "\n".join(documents.table(head, rows, "l"))


def main() -> None:
    """Make what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="x_train [n, h, w, c] uint8 and y_train, as .npz")
    parser.add_argument("--out", type=Path, required=True, help="where runs are kept, a JSON file")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--size", type=int, default=16, help="side the images are averaged down to")
    parser.add_argument("--target", type=float, default=1.0, help="mean training loss of one epoch's steps")
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(table(Runs(arguments)))


if __name__ == "__main__":
    main()
