from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flatprune import runs
from flatprune.settings import Settings
from tests.command_line import flatprune, kept_couplings, npz  # noqa: F401

SMALL = Settings(widths=(8, 6), epochs=2, train_size=120, batch_size=40, target_params=0.5, threads=1)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A finished run beside its dense network; not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    runs.run(Settings(**{**SMALL.as_dict(), "widths": (8, 6), "exclude": (), "compare_dense": True}), folder)
    return folder


@pytest.fixture
def folder(finished_run, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))
