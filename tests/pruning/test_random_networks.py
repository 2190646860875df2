"""Networks drawn at random from everything that couples neurons: pruned they compute what the masked ones do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flatprune.coupling import find_coupling
from flatprune.cutting import surgery
from tests.pruning.pruning_networks import masked
from tests.pruning.random_networks import drawn


def half_of(groups) -> dict[int, Tensor]:
    """Random neurons, as many as may go but half of each slice."""
    pruned = {}
    for position, group in enumerate(groups):
        parts = []
        for part in range(group.groups):
            neurons = (group.group_of == part).nonzero().flatten()
            parts.append(neurons[torch.randperm(len(neurons))[: len(neurons) // 2]])
        if len(torch.cat(parts)):
            pruned[position] = torch.cat(parts).sort().values
    return pruned


@pytest.mark.parametrize("seed", range(10))
def test_pruned_equals_masked_and_trains(seed):
    model, x = drawn(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    coupling = find_coupling(model, x[:2])
    allowed = ("output of the model", "cannot be cut evenly", "meets something of fixed size")
    assert all(any(word in reason for word in allowed) for reason in coupling.refused.values()), coupling.refused
    pruned = half_of(coupling.groups)
    assert pruned
    with torch.no_grad(), masked(model, coupling, pruned):
        full, expected = drawn(seed)[0](x), model(x)
    surgery.plan(model, coupling, pruned, optimizer=optimizer).commit()
    with torch.no_grad():
        found = model(x)
    effect = float((expected - full).abs().max())
    assert effect > 1e-4
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * effect)
    y = torch.arange(8) % 4
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(F.cross_entropy(model.train()(x), y))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
