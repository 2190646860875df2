"""Texts and transformers of a study: the same data each time, tokens that outlive normalisation, networks to prune."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from flatprune.data import load_dataset
from flatprune.models import parameter_count
from flatprune.named import allow
from flatprune.study import read_study
from tests.bench.test_evidence import GRIDS

pytestmark = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers")


def test_tokens_are_read_off_normalised_bits():
    from bench.studies.texts import bits, tokens

    codes = np.random.default_rng(0).integers(0, 128, (50, 7))
    images = torch.from_numpy(bits(codes, 7)).permute(0, 3, 1, 2).float()
    mean, std = (value.view(1, -1, 1, 1) for value in (images.mean((0, 2, 3)), images.std((0, 2, 3))))
    assert torch.equal(tokens((images - mean) / std), torch.from_numpy(codes))


@pytest.mark.parametrize("name", ["sources", "manual"])
def test_texts_are_whole_and_apart(name):
    from bench.studies import texts

    allow(f"bench.studies.texts:{name}")
    data = load_dataset(f"bench.studies.texts:{name}", classes=128 if name == "manual" else None, validation=0.2)
    train, test = texts.tokens(data.x_train), texts.tokens(data.x_test)
    assert len(train) > 3000 and len(test) > 500
    if name == "manual":  # the label of a place is the token of the next one
        assert torch.equal(train[:, 1:], data.y_train[:, :-1])
        assert bytes(train[0].tolist()).isascii()
    else:
        assert torch.bincount(data.y_test).float().std() < 60 and int(train.max()) == 511
    both = {tuple(row) for row in train.tolist()} & {tuple(row) for row in test.tolist()}
    assert len(both) < len(test) / 100


def test_narrowed_networks_have_the_size_that_pruning_leaves():
    from flatprune.models import build

    shapes = {
        "vit_tiny": (3, 16, 16),
        "bench.studies.texts:bert": (9, 1, 24),
        "bench.studies.texts:decoder": (7, 1, 64),
    }
    study, sizes = read_study(GRIDS / "transformers.yaml"), {}
    for cell in study.cells:
        settings = cell.settings
        allow(settings.model)
        if cell.seed == 11 and cell.variant in ("narrowed", "dense"):
            classes = settings.classes or (6 if "texts" in settings.data else 10)
            network = build(settings.model, shapes[settings.model], classes, settings.widths)
            sizes[cell.variant, dict(cell.point)["task"]] = parameter_count(network)
    for task in study.axes["task"]:
        wanted = float(task.split()[1]) / 100
        assert sizes["narrowed", task] / sizes["dense", task] == pytest.approx(wanted, rel=0.025)
