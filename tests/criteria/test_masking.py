"""The network that games try coalitions on computes what the one that is cut does."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

from flatprune.coupling import find_coupling
from flatprune.criteria.masking import masked_tensors, survivors_only
from flatprune.cutting import surgery
from tests.pruning.pruning_networks import digits

NORMS = {
    "layer": lambda: nn.LayerNorm(12),
    "layer without bias": lambda: nn.LayerNorm(12, bias=False),
    "root mean square": lambda: nn.RMSNorm(12),
    "group": lambda: nn.GroupNorm(3, 12),
    "batch": lambda: nn.BatchNorm1d(12).eval(),
}


@pytest.mark.parametrize("name", NORMS)
def test_the_masked_network_computes_what_the_cut_one_does(name):
    norm = NORMS[name]()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), norm, nn.Tanh(), nn.Linear(12, 10)).eval()
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    x = digits()[0][:20]
    coupling = find_coupling(model, x[:2])
    pruned = {0: torch.tensor([0, 1, 5, 6, 9, 10])}  # two of each slice of the group norm
    with torch.no_grad(), survivors_only(model, coupling.groups, pruned):
        tensors = masked_tensors(dict(model.named_parameters()), coupling.groups, pruned)
        expected = functional_call(model, tensors, (x,))
    assert not any(module._forward_hooks for module in model.modules())
    surgery.plan(model, coupling, pruned).commit()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
