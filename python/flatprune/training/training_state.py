"""The state of a `Trainer` as a checkpoint holds it, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from flatprune.checkpoint import CHECKPOINT_FORMAT, CHECKPOINT_VERSION
from flatprune.errors import InputError
from flatprune.export import take_tensors
from flatprune.training.builders import fused_optimizer
from flatprune.training.run_state import Progress

if TYPE_CHECKING:
    from flatprune.training.trainer import Trainer


def state_of(trainer: Trainer) -> dict[str, Any]:
    """The content of `checkpoint.pt`; see `flatprune.checkpoint`."""
    return {
        "format": CHECKPOINT_FORMAT,
        "version": CHECKPOINT_VERSION,
        "settings": trainer.settings.as_dict(),
        "data_digest": trainer.dataset.digest,
        "progress": {**vars(trainer.progress), **trainer.sums.state_dict()},
        "history": trainer.history,
        "model": trainer.model.state_dict(),
        "ema": None if trainer.average is None else trainer.average.module.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        **{name: None if part is None else part.state_dict() for name, part in _parts(trainer).items()},
        "rng": {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(trainer.device) if trainer.device.type == "cuda" else None,
            "order": trainer.order_generator.get_state(),
        },
    }


def load_state(trainer: Trainer, state: dict[str, Any]) -> None:
    """Go on from `state_of`, with the model's tensors taken already.

    Raises:
        InputError: the state is of a run on other data.
    """
    if state["data_digest"] != trainer.dataset.digest:
        raise InputError(f"{trainer.dataset.name}: not the data of the checkpoint; a run resumes only on the same data")
    if trainer.average is not None:
        take_tensors(trainer.average.module, state["ema"])
    _load_optimizer(trainer, state["optimizer"])
    for name, part in _parts(trainer).items():
        if part is not None:
            part.load_state_dict(state[name])
    sums = {name: state["progress"][name] for name in trainer.sums.state_dict()}
    trainer.sums.load_state_dict(sums)
    trainer.progress = Progress(**{name: value for name, value in state["progress"].items() if name not in sums})
    if trainer.guard is not None:
        trainer.guard.best = trainer.progress.best_held_out
    if trainer.progress.order is not None:
        trainer.progress.order = trainer.progress.order.cpu()
    trainer.history = list(state["history"])
    _load_generators(trainer, state["rng"])


def _parts(trainer: Trainer) -> dict[str, Any]:
    """Name in the checkpoint -> what has a state of its own, or None where the run does without."""
    return {
        "scaler": trainer.scaler if trainer.scaler.is_enabled() else None,
        "curvature": trainer.curvature,
        "flatness": trainer.flatness,
        "sam": trainer.sam,
        "disout": trainer.disout,
        "pruner": trainer.pruner,
    }


def _load_optimizer(trainer: Trainer, state: dict[str, Any]) -> None:
    fused = fused_optimizer(trainer.device)  # the device may be another one than before
    groups = [{**group, "fused": fused} for group in state["param_groups"]]
    trainer.optimizer.load_state_dict({**state, "param_groups": groups})


def _load_generators(trainer: Trainer, states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"].cpu())
    trainer.order_generator.set_state(states["order"].cpu())
    if states["cuda"] is not None and trainer.device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"].cpu(), trainer.device)
