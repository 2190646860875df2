"""What a run tells whoever looks on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flatprune.training.trainer import Trainer


class Observer:
    """Told about a run while it goes on; the methods do nothing unless overridden."""

    def start(self, trainer: Trainer) -> None:
        """Training begins or goes on."""

    def step(self, trainer: Trainer) -> None:
        """An optimizer step is done."""

    def removal(self, record: dict[str, Any]) -> None:
        """Neurons were removed, or an event removed none, or pruning was stopped, by `record["kind"]`."""

    def epoch(self, record: dict[str, Any]) -> None:
        """An epoch is done and tested."""

    def stop(self) -> None:
        """Training ended, was stopped or failed."""
