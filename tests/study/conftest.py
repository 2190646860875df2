from __future__ import annotations

from pathlib import Path

import pytest

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
