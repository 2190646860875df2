"""Fixtures of tests that call the command line, or give it data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from flatprune.cli import main
from tests.cli.small_images import image_arrays
from tests.found_couplings import couplings_are_kept


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def kept_couplings():
    with couplings_are_kept():
        yield


@pytest.fixture
def flatprune(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs the command line in this process: flatprune("run", "--epochs", 2) -> code, stdout, stderr."""

    def call(*arguments: Any) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture
def npz(tmp_path: Path) -> Callable[..., Path]:
    """Writes an .npz of small images, with arrays replaced (or left out, by None)."""

    def write(name: str = "images.npz", *, shape: tuple[int, ...] = (8, 8, 1), **changes: Any) -> Path:
        arrays = {**image_arrays(shape=shape), **changes}
        path = tmp_path / name
        np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
        return path

    return write
