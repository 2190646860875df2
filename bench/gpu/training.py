"""A training step on a GPU: the bare one against one with all defaults of `flatprune run`, in three precisions.

python -m bench.gpu.training NETWORK [--dry] --out FILE
"""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.documents import write_json
from bench.gpu.measure import alternate, precision
from bench.gpu.names import KINDS, TRAINED
from bench.gpu.run import step_arguments
from bench.results import Case
from bench.timing import timed_case

STEPS = 40  # a turn: four updates of the factors of a network with convolutions, five steps of the flatness term
ROUNDS, SECONDS = 5, 3.0
QUICK_WIDTHS = {"resnet20": (8, 8, 8), "vgg19_bn": (8,) * 16, "mlp": (24, 16)}


def trained(name: str, device: torch.device, quick: bool, out: Path) -> None:
    """A case for each precision, bare and with curvature, flatness and pruner; written after each."""
    found: dict[str, Any] = {"cases": [], "failed": {}}
    with tempfile.TemporaryDirectory() as folder:
        for kind, settings in KINDS.items():
            try:
                found["cases"].append(_measured(Path(folder), name, kind, settings, device, quick))
                print(found["cases"][-1])
            except Exception as error:  # the other precisions are still of use
                found["failed"][kind] = f"{type(error).__name__}: {error}"
                traceback.print_exc()
            write_json(out, found)
    if found["failed"]:
        raise SystemExit(1)


def _measured(folder: Path, name: str, kind: str, settings: dict[str, Any], device: torch.device, quick: bool) -> Case:
    """A step of both variants, which take turns."""
    steps, rounds = (2, 3) if quick else (STEPS, ROUNDS)
    bare, full = {"flatness": "off", "target_params": 1.0, "factor_update_steps": 2**31 - 1}, {}
    with precision("float32"):
        calls = {
            label: _steps(folder, name, {**settings, **more}, device, quick, steps)
            for label, more in (("bare", bare), ("flatprune", full))
        }
        samples = alternate(calls, device, rounds, SECONDS)
    facts = {"network": name, "precision": kind}
    return timed_case("training step", f"{name}, {kind}", samples, per=steps, **facts)


def _steps(
    folder: Path, name: str, changes: dict[str, Any], device: torch.device, quick: bool, steps: int
) -> Callable[[], None]:
    """A call that trains on for so many steps, none of which removes neurons; the warm-up is over."""
    from flatprune.data import load_dataset
    from flatprune.settings import Settings
    from flatprune.training.trainer import Trainer

    size = 8 if quick else 128
    side, channels = TRAINED[name]
    path = images(folder, 8 if quick and name == "resnet20" else side, channels, size)
    widths = QUICK_WIDTHS[name] if quick else None
    options = {"data": str(path), "model": name, "widths": widths, "batch_size": size, "device": str(device)}
    schedule = {"epochs": 10**6, "prune_start": 0.9, "prune_end": 0.9}
    settings = Settings(**{**options, **schedule, **changes})
    trainer = Trainer(settings, load_dataset(str(path), device=device))
    trainer.model.train()
    indices = _endless(torch.arange(len(trainer.dataset.x_train), device=device), size)
    for _ in range(10 if quick else 30):
        trainer._train_step(next(indices))
    if trainer.flatness is not None:
        trainer.flatness.end_warmup()

    def train() -> None:
        for _ in range(steps):
            trainer._train_step(next(indices))

    return train


def images(folder: Path, side: int, channels: int, batch: int, batches: int = 4) -> Path:
    """An .npz of random images: what a step costs does not depend on what they show."""
    path = folder / f"{side}x{channels}.npz"
    if not path.exists():
        rng = np.random.default_rng(0)
        count = batches * batch
        pixels = rng.integers(0, 256, (count, side, side, channels), dtype=np.uint8)
        labels = np.arange(count) % 10
        np.savez(path, x_train=pixels, y_train=labels, x_test=pixels[:batch], y_test=labels[:batch])
    return path


def _endless(order: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    while True:
        yield from order.split(size)


def main() -> None:
    arguments = step_arguments(__doc__, TRAINED)
    device = torch.device("cpu") if arguments.dry else torch.device("cuda", 0)
    trained(arguments.network, device, arguments.dry, arguments.out)


if __name__ == "__main__":
    main()
