from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flatprune.cli import main
from tests.command_line import flatprune, kept_couplings  # noqa: F401
from tests.study.study_command import Outcome

TWO_RUNS = """
title: two
base: {data: digits, model: mlp, epochs: 1, target_params: 0.5, widths: [8, 8]}
grid: {seed: [1, 2]}
"""


@pytest.fixture
def study_file(tmp_path: Path):
    """Writes a study and returns its path."""

    def write(text: str = TWO_RUNS, name: str = "small.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.fixture
def study(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`flatprune study` in this process, whose imports are made; its runs have processes of their own."""

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        return Outcome(main(["study", *map(str, arguments)]), *capsys.readouterr())

    return call
