from __future__ import annotations

import pytest
import torch
from torch import nn

from flatprune import models
from flatprune.errors import InputError


@pytest.mark.parametrize("name", ["mlp", "lenet5", "convnet", "vgg11_bn", "resnet20"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (2, 9, 13)])
def test_adapts_to_the_images(name, shape):
    model = models.build(name, shape, 7).eval()
    assert model(torch.randn(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "shape", "widths", "expected"),
    [
        ("mlp", (1, 28, 28), (300, 100), 266_610),
        ("convnet", (1, 14, 14), None, 72_666),
        ("lenet5", (1, 28, 28), None, 61_706),
        ("mlp", (1, 8, 8), None, 64 * 128 + 128 + 128 * 64 + 64 + 64 * 10 + 10),
        ("resnet56", (3, 32, 32), None, 855_770),
    ],
)
def test_sizes(name, shape, widths, expected):
    assert models.parameter_count(models.build(name, shape, 10, widths)) == expected


@pytest.mark.parametrize("name", models.names())
def test_every_name_builds(name):
    assert models.layer_widths(models.build(name, (3, 16, 16), 5))


def test_the_same_seed_gives_the_same_network():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(models.build("convnet", (1, 8, 8), 10).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_widths():
    model = models.build("convnet", (1, 8, 8), 10, (3, 4, 5, 6, 7, 8))
    assert list(models.layer_widths(model).values()) == [3, 4, 5, 6, 7, 8, 10]
    with pytest.raises(InputError, match="got 2 numbers, expected 6"):
        models.build("convnet", (1, 8, 8), 10, (3, 4))


def test_multiply_accumulates_of_groups_keep_the_mode():
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=2, bias=False),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Flatten(),
        nn.Linear(128, 5),
    )
    expected = 36 * (8 * 2 * 9) + 16 * (8 * 9) + 128 * 5
    assert models.multiply_accumulates(model, torch.zeros(1, 4, 6, 6)) == expected
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
