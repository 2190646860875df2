"""The script of the published figures: its table and its networks."""

from __future__ import annotations

import pytest

from bench.published import PUBLISHED, STUDY, main
from flatprune.study import read_study


def test_every_published_figure_has_its_network():
    assert set(PUBLISHED) <= set(read_study(STUDY).axes["network"])


@pytest.mark.thorough
def test_quick(capfd):
    assert main(["--quick", "--jobs", "1"]) == 0
    out = capfd.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("| ResNet20, 47 % fewer |"))
    removed, last = (float(cell) for cell in line.split("|")[2:4])
    assert 47.0 <= removed < 60.0 and 0.0 <= last <= 100.0 and "CHIP" not in line


def test_stopped_in_pieces(capfd):
    assert main(["--quick", "--jobs", "1", "--minutes", "1e-9"]) == 3
    assert "not done yet" in capfd.readouterr().out
