"""Every network that ships: cut to 30 % of its parameters it computes what the masked one does, trains and rebuilds."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from pruning_networks import zeroed_inputs
from torch import Tensor, nn

from flatprune import export, models, surgery
from flatprune.costs import ParameterCount
from flatprune.graph import neuron_groups
from flatprune.selection import Limits, select

SHAPE = (2, 8, 8)
WIDTHS = {
    "mlp": (24, 16),
    "lenet5": (4, 6, 20, 12),
    "convnet": (4, 4, 8, 8, 12, 12),
    "vgg11_bn": (6,) * 8,
    "vgg13_bn": (6,) * 10,
    "vgg16_bn": (6,) * 13,
    "vgg19_bn": (6,) * 16,
    **{f"resnet{depth}": (6, 6, 8) for depth in (20, 32, 44, 56, 110)},
    "wide_resnet32": (6, 8, 8),
    "resnet18": (6, 6, 8, 8),
    "mobilenetv2": (4, 4, 4, 4, 6, 6, 6, 8, 16),
    "densenet40": (6, 3, 4, 3),
    "vit_tiny": (48, 40),
}


@functools.cache
def image_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(16, *SHAPE, generator=generator), torch.randint(0, 7, (16,), generator=generator)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = models.build(name, SHAPE, 7, WIDTHS[name])
    for module in model.modules():  # norms that are not the identity, signals that last through many layers
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    with torch.no_grad():
        model(image_batch()[0])
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.momentum = 0.1
    return model.eval()


def test_every_model_is_tested():
    assert set(WIDTHS) == set(models.names())


@pytest.mark.parametrize("name", models.names())
def test_pruned_to_thirty_percent(name, tmp_path):
    x, y = image_batch()
    model = build(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    groups = neuron_groups(model, x[:2]).groups
    scores = [torch.rand(group.width, dtype=torch.float64) for group in groups]
    start = models.parameter_count(model)
    gone = select(ParameterCount(model, groups), groups, scores, int(0.3 * start), Limits(1, 1, 1.0))
    handles = zeroed_inputs(groups, gone)
    with torch.no_grad():
        expected, full = model(x), build(name)(x)
    for handle in handles:
        handle.remove()
    surgery.plan(model, groups, gone, optimizer=optimizer).commit()
    assert models.parameter_count(model) <= 0.3 * start
    with torch.no_grad():
        found = model(x)
    effect = float((expected - full).abs().max())
    assert effect > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * effect)

    arguments = {"name": name, "image_shape": SHAPE, "classes": 7, "widths": WIDTHS[name]}
    rebuilt = export.rebuild(arguments, model.state_dict()).eval()
    assert repr(rebuilt) == repr(model)
    with torch.no_grad():
        assert torch.equal(rebuilt(x), found)

    before = copy.deepcopy(list(model.parameters()))
    loss = F.cross_entropy(model.train()(x), y)
    loss.backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters()) if b.grad.abs().max() > 1e-3)
    with torch.no_grad():
        assert F.cross_entropy(model(x), y) < loss
