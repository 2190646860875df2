"""Packages that only parts of flatprune need, and what installs each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flatprune.errors import MissingPackageError

EXTRAS = {
    "scipy": "prune",
    "filelock": "cli",
    "loky": "cli",
    "pydantic": "cli",
    "typer": "cli",
    "rich": "cli",
    "yaml": "cli",
    "matplotlib": "cli",
    "sklearn": "cli",
    "PIL": "cli",
    "datasets": "datasets",
    "safetensors": "export",
    "onnx": "export",
    "onnxscript": "export",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "submitit": "submitit",
    "dask": "dask",
    "distributed": "dask",
    "ray": "ray",
    "optuna": "tune",
}
"""Module -> the extra of kfac-ext that brings it."""


@contextmanager
def needed_by(what: str) -> Iterator[None]:
    """Imports inside that fail for want of one of EXTRAS raise a MissingPackageError that says what installs it.

    Example:
        >>> with needed_by("export to onnx"):
        ...     import onnxscript
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise MissingPackageError(
            f"{what} needs {package}, which is not installed: pip install 'kfac-ext[{EXTRAS[package]}]'"
        ) from error
