"""From the batch of a step to the gradients at the parameters: precision, parts, flatness."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from flatprune.flatness.sam import SAM, MomentumSAM
from flatprune.flatness.spectrum import Flatness
from flatprune.training.batches import Batch
from flatprune.training.state import EpochSums

AMP_TYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Gradients:
    """Leaves the gradients of the mean objective of a step's batches, times the scaler's scale, at the parameters.

    The forward runs in autocast, where that is wanted; the loss is computed in float32.

    Args:
        forward: the model, or what computes the same.
        criterion: (logits [n, classes, ...], target) -> mean loss.
        device: of the model.
        amp: a name of `AMP_TYPES`.
        scaler: of the loss, for fp16.
        flatness, sam, msam: what acts on the gradients, or None: one of them, or the first and the last.
        check: told every loss.
        unsynced: around all parts but the last, whose gradients alone are averaged over ranks.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        criterion: nn.Module,
        device: torch.device,
        amp: str,
        scaler: torch.amp.GradScaler,
        flatness: Flatness | None,
        sam: SAM | None,
        msam: MomentumSAM | None,
        check: Callable[[Tensor], None],
        unsynced: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._unsynced = unsynced
        self._forward, self._criterion, self._device, self._type = forward, criterion, device, AMP_TYPES[amp]
        self._scaler, self._flatness, self._sam, self._msam, self._check = scaler, flatness, sam, msam, check

    def compute(self, batches: list[Batch], sums: EpochSums) -> None:
        """Gradients of the mean over batches of equal size, added to those at hand; `sums` gets their figures."""
        with nullcontext() if self._msam is None else self._msam.moved():
            for number, batch in enumerate(batches, 1):
                with nullcontext() if number == len(batches) else self._unsynced():
                    self._add(batch, len(batches), sums)
        if self._sam is not None:
            moved = self._sam.replace_gradients(lambda: self._whole(batches))
            if moved is not None:
                self._check(moved)

    def _add(self, batch: Batch, parts: int, sums: EpochSums) -> None:
        logits, loss = self._loss(batch)
        objective = loss if self._flatness is None else loss + self._flatness.penalty(batch.x, logits, loss)
        self._check(objective)
        self._scaler.scale(objective / parts).backward()
        sums.add(loss.detach(), logits.detach(), batch.labels)

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits and mean loss."""
        enabled = self._type is not None
        with torch.autocast(self._device.type, dtype=self._type) if enabled else nullcontext():
            logits = self._forward(batch.x)
        return logits, self._criterion(logits.float(), batch.target)

    def _whole(self, batches: list[Batch]) -> Tensor:
        """The mean loss of all batches, scaled as their gradients are, in one graph."""
        losses = [self._loss(batch)[1] for batch in batches]
        return self._scaler.scale(sum(losses[1:], losses[0]) / len(losses))
