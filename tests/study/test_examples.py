"""What the examples show works."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.thorough
def test_own_data(tmp_path):
    file = tmp_path / "pruned.pt"
    done = subprocess.run([sys.executable, EXAMPLES / "own_data.py", file], capture_output=True, text=True, check=True)
    accuracy, left, whole = re.findall(r"[\d.]+", done.stdout)
    assert float(accuracy) > 85.0 and int(left) <= 1.01 * 0.2 * int(whole)
    model = torch.load(file, weights_only=False)
    assert sum(p.numel() for p in model.parameters()) == int(left)
    assert model(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
