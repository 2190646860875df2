"""Loggers: TensorBoard, Weights & Biases and MLflow, which draw what a run tells while it trains.

Each has the methods `log(step, scalars)` and `close()`; anything else with such a `log` does as well.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatprune.errors import InputError, did_you_mean
from flatprune.extras import needed_by

if TYPE_CHECKING:
    from flatprune.pruning.scalars import Logger


class TensorBoardLogger:
    """Writes event files of TensorBoard; `tensorboard --logdir FOLDER` shows them.

    Args:
        folder: for the files.
        purge_step: what an earlier writer told of this step and of later ones is not shown; None: all is.

    Example:
        >>> pruning = PruneWhileTraining(..., logger=TensorBoardLogger("runs/mine"))
    """

    def __init__(self, folder: str | os.PathLike[str], purge_step: int | None = None) -> None:
        with needed_by("TensorBoardLogger"):
            from torch.utils.tensorboard import SummaryWriter
        self._writer = SummaryWriter(os.fspath(folder), purge_step=purge_step)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """One curve a name; a slash makes headings."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class WandbLogger:
    """Logs to the run of Weights & Biases that is active, or begins one.

    Args:
        options: of `wandb.init`, such as `project`, for a run that it begins, and ends when it is closed.
    """

    def __init__(self, **options: Any) -> None:
        with needed_by("WandbLogger"):
            import wandb
        self._is_own = wandb.run is None
        self._run: Any = wandb.init(**options) if wandb.run is None else wandb.run

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """In one call, so that they stand beside each other."""
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        """End the run, if it is its own."""
        if self._is_own:
            self._run.finish()


class MLflowLogger:
    """Logs to the run of MLflow that is active, or begins one.

    Args:
        parameters: what `mlflow.log_params` shall keep of a run that it begins, and ends when it is closed.
        options: of `mlflow.start_run`, such as `run_name`.
    """

    def __init__(self, parameters: Mapping[str, Any] | None = None, **options: Any) -> None:
        with needed_by("MLflowLogger"):
            import mlflow
        self._mlflow: Any = mlflow
        active = mlflow.active_run()
        self._is_own = active is None
        self._id = (active or mlflow.start_run(**options)).info.run_id
        if self._is_own and parameters:
            mlflow.log_params(dict(parameters))

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """In one call."""
        self._mlflow.log_metrics(dict(scalars), step=step, run_id=self._id)

    def close(self) -> None:
        """End the run, if it is its own."""
        if self._is_own:
            self._mlflow.end_run()


def _tensorboard(folder: Path, part: str, settings: Mapping[str, Any], step: int) -> Logger:
    return TensorBoardLogger(folder / "tensorboard" / part, purge_step=step + 1 if step else 0)


def _wandb(folder: Path, part: str, settings: Mapping[str, Any], step: int) -> Logger:
    name = folder.absolute().name
    return WandbLogger(project="flatprune", group=name, name=f"{name}/{part}", config=dict(settings), dir=folder)


def _mlflow(folder: Path, part: str, settings: Mapping[str, Any], step: int) -> Logger:
    return MLflowLogger(settings, run_name=f"{folder.absolute().name}/{part}")


LOGGERS: dict[str, Callable[[Path, str, Mapping[str, Any], int], Any]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
"""Name, of `flatprune run --logger` -> what makes it for a part ("pruned", "dense") of a run in a folder, at a step."""


def check_logger(name: str) -> None:
    """Raise InputError for a name that is none of LOGGERS, or whose package is missing."""
    if name not in LOGGERS:
        raise InputError(f"logger is {name!r}, {did_you_mean(name, LOGGERS)}")
    with needed_by(f"--logger {name}"):
        __import__("torch.utils.tensorboard" if name == "tensorboard" else name)
