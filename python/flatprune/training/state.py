"""Where a run stands: counters, sums of the running epoch, whether the loss is still finite, random streams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfac_ext.curvature.modes import reading_is_free


@dataclass
class Progress:
    """All that a checkpoint must know besides tensors and generators.

    Attributes:
        epoch: epochs that are complete.
        step: optimizer steps taken.
        batch: batches of the running epoch that are done.
        order: the running epoch's order of the samples, on the CPU, or None between epochs.
        seconds: time spent in training and testing so far.
        removal_seconds: that part of it which removal events took.
        best_accuracy: highest test accuracy after any epoch that was tested, in percent.
        best_held_out: highest accuracy on held-out images at any removal event, in percent; None before the first one.
    """

    epoch: int = 0
    step: int = 0
    batch: int = 0
    order: Tensor | None = None
    seconds: float = 0.0
    removal_seconds: float = 0.0
    best_accuracy: float = 0.0
    best_held_out: float | None = None


class EpochSums:
    """Loss and hits summed over the running epoch, on the device, so that no step waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._correct = torch.zeros((), dtype=torch.int64, device=device)
        self.seen = 0

    @torch.no_grad()
    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Take in a batch: its mean loss, logits [n, classes, ...] and labels [n, ...]."""
        self._loss += loss.double() * labels.numel()
        self._correct += (logits.argmax(1) == labels).sum()
        self.seen += labels.numel()

    def figures(self, over_ranks: Callable[[list[float]], list[float]] = lambda values: values) -> tuple[float, float]:
        """Mean loss and accuracy in percent; waits for the device.

        Args:
            over_ranks: sums numbers over all ranks that have seen parts of the epoch.

        Raises:
            ZeroDivisionError: nothing has been seen.
        """
        loss, correct, seen = over_ranks([float(self._loss), float(self._correct), float(self.seen)])
        return loss / seen, 100.0 * correct / seen

    def reset(self) -> None:
        """Begin an epoch."""
        self._loss.zero_()
        self._correct.zero_()
        self.seen = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"loss_sum": float(self._loss), "correct": int(self._correct), "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._loss.fill_(state["loss_sum"])
        self._correct.fill_(state["correct"])
        self.seen = state["seen"]


class LossWatch:
    """Keeps a loss that is not finite until somebody asks.

    Attributes:
        is_free: whether asking costs no wait for the device, so that one may ask after every loss.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_free = reading_is_free(device)
        self._kept = torch.zeros((), device=device)

    def add(self, loss: Tensor) -> None:
        """Take in a loss, without a wait for the device."""
        value = loss.detach()
        self._kept = value if self.is_free else torch.where(self._kept.isfinite(), value.to(self._kept), self._kept)

    def value(self) -> float:
        """The last loss, or on a device the first one that was not finite; waits for the device."""
        return float(self._kept)


def generator_states(device: torch.device, order: torch.Generator) -> dict[str, Tensor | None]:
    """The states of all that draws in a run: torch's streams and the generator of the samples' order."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"torch": torch.get_rng_state(), "cuda": cuda, "order": order.get_state()}


def load_generators(states: dict[str, Any], device: torch.device, order: torch.Generator) -> None:
    """Go on drawing from `generator_states`; on another device than before, its own stream begins as it is."""
    torch.set_rng_state(states["torch"].cpu())
    order.set_state(states["order"].cpu())
    if states["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
