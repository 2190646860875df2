"""Networks of every code that ships: cut to 30 % of its parameters it computes what the masked one does and trains."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from flatprune import export, models
from flatprune.coupling import find_coupling
from flatprune.cutting import surgery
from flatprune.pruning.costs import ParameterCount
from flatprune.pruning.limits import Limits
from flatprune.pruning.selection import select
from tests.conftest import thorough
from tests.pruning.pruning_networks import masked
from tests.pruning.shipped_networks import WIDTHS, arguments, build, image_batch

SAME_CODE = ("resnet32", "resnet44", "resnet110", "vgg13_bn", "vgg16_bn")  # at other depths; their groups are stored


def test_every_model_is_tested():
    assert set(WIDTHS) == set(models.names())


OF_OTHER_CODE = [name for name in models.names() if name not in SAME_CODE]


@pytest.mark.parametrize("name", thorough(OF_OTHER_CODE, but=["mlp", "lenet5", "resnet20", "vit_tiny", "vgg11_bn"]))
def test_pruned_to_thirty_percent(name, tmp_path):
    x, y = image_batch()
    model = build(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    coupling = find_coupling(model, x[:2])
    groups = coupling.groups
    scores = [torch.rand(group.width, dtype=torch.float64) for group in groups]
    start = models.parameter_count(model)
    pruned = select(ParameterCount(model, groups), groups, scores, int(0.3 * start), Limits(1, 1, 1.0))
    with torch.no_grad(), masked(model, coupling, pruned):
        expected, full = model(x), build(name)(x)
    surgery.plan(model, coupling, pruned, optimizer=optimizer).commit()
    assert models.parameter_count(model) <= 1.01 * 0.3 * start
    with torch.no_grad():
        found = model(x)
    effect = float((expected - full).abs().max())
    assert effect > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * effect)

    rebuilt = models.build(**arguments(name)).eval()
    export.take_tensors(rebuilt, model.state_dict())
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
