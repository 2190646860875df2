"""What a run tells a logger while it goes on: sizes and changes of the loss at its events, figures of its epochs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from flatprune.errors import InputError
from flatprune.pruning.scalars import event_scalars, state_scalars
from flatprune.training.trainer import Observer

if TYPE_CHECKING:
    from flatprune.training.trainer import Trainer

_OF_EPOCHS = {
    "train_loss": "train/loss",
    "train_accuracy": "train/accuracy",
    "learning_rate": "train/learning_rate",
    "test_loss": "test/loss",
    "test_accuracy": "test/accuracy",
    "params": "size/params",
    "params_fraction": "size/params_fraction",
    "spectral_radius": "curvature/spectral_radius",
    "spectral_radius_geometric_mean": "curvature/spectral_radius_geometric_mean",
}
"""Key of an epoch's record -> scalar."""


def epoch_scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """What the record of an epoch says; accuracies in percent; what was not measured is left out."""
    return {name: float(record[key]) for key, name in _OF_EPOCHS.items() if record.get(key) is not None}


class LoggedRun(Observer):
    """Tells a logger of a run. One that fails while the run goes on is left alone from then on, with a warning.

    Args:
        name: of the logger, for messages.
        make: gives the logger of the run with these settings, which stands at this step.

    Raises:
        InputError: in `start`: the logger cannot be made.
    """

    def __init__(self, name: str, make: Callable[[Mapping[str, Any], int], Any]) -> None:
        self._name, self._make = name, make
        self._logger: Any = None
        self._had_event = False

    def start(self, trainer: Trainer) -> None:
        """Make the logger; of a new run, say what the network is."""
        step = trainer.progress.step
        try:
            self._logger = self._make(trainer.settings.as_dict(), step)
        except Exception as error:  # whatever a service far away may say
            raise InputError(f"--logger {self._name}: {error}") from error
        if step == 0 and trainer.pruner is not None:
            self._log(0, state_scalars(trainer.pruner, trainer.curvature))

    def removal(self, record: dict[str, Any]) -> None:
        """Keep in mind that the step in hand is an event."""
        self._had_event = True

    def step(self, trainer: Trainer) -> None:
        """Tell of an event."""
        if not self._had_event:
            return
        self._had_event = False
        pruner = trainer.pruner
        assert pruner is not None
        removals = [record for record in pruner.history if record.step == pruner.step_count]
        self._log(trainer.progress.step, {**state_scalars(pruner, trainer.curvature), **event_scalars(removals)})

    def epoch(self, record: dict[str, Any]) -> None:
        """Tell of an epoch."""
        self._log(record["step"], epoch_scalars(record))

    def stop(self) -> None:
        """Close the logger."""
        self._told(lambda logger: logger.close())

    def _log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._told(lambda logger: logger.log(step, scalars))

    def _told(self, tell: Callable[[Any], None]) -> None:
        if self._logger is None:
            return
        try:
            tell(self._logger)
        except Exception as error:  # a run of hours does not end with the connection of its logger
            self._logger = None
            warnings.warn(f"--logger {self._name}: {error!r}; no more is logged", stacklevel=2)


class Observers(Observer):
    """Several observers, told one after the other.

    Args:
        observers: that are told.
    """

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def start(self, trainer: Trainer) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.start(trainer)

    def step(self, trainer: Trainer) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.step(trainer)

    def removal(self, record: dict[str, Any]) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.removal(record)

    def epoch(self, record: dict[str, Any]) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.epoch(record)

    def stop(self) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.stop()
