"""Every block of docs/bring-your-model.md runs as it stands, prunes, and leaves a network that can be trained on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

import flatprune

PAGE = (Path(__file__).parents[2] / "docs/bring-your-model.md").read_text()
FIRST, *RECIPES = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
TITLES = re.findall(r"^## (.*)$", PAGE, flags=re.MULTILINE)


def test_there_are_twelve_recipes():
    assert [title.split(".")[0] for title in TITLES] == [str(number) for number in range(1, 13)]
    assert len(RECIPES) == 13  # the third has two


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(len(RECIPES)))
def test_a_recipe_runs_as_it_stands(number):
    code = RECIPES[number]
    if "from transformers" in code:
        pytest.importorskip("transformers")
    if "torch.compile(" in code:
        code = code.replace(
            "torch.compile(model)", 'torch.compile(model, backend="aot_eager")'
        )  # needs no C++ compiler
    names: dict = {}
    exec(FIRST + code, names)
    model, pruner, curvature = names["model"], names["pruner"], names["curvature"]
    assert isinstance(pruner, flatprune.Pruner) and pruner.step_count == names["steps"]
    assert pruner.params <= 1.01 * 0.6 * pruner.params_start
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert bool(curvature.factors.buffer.isfinite().all()) and curvature.spectral_radius() > 0
    optimizers = [value for value in names.values() if isinstance(value, Optimizer)]
    assert optimizers
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            shapes = {leaf.shape for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor) and leaf.dim()}
            assert shapes <= {parameter.shape}
    if "update_config" in code:
        before, after = names["changed"]["intermediate_size"]
        assert after < before == names["sizes"]["intermediate_size"]
