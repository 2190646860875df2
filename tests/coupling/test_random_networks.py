"""Networks composed at random: every group that is found is right, and what is cut trains on."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from flatprune.coupling import find_coupling
from tests.coupling.composed_networks import composed
from tests.coupling.oracle import assert_every_group_is_right, cut, some_of

OPTIONS = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=40, derandomize=True, **OPTIONS)
@given(st.randoms(use_true_random=False))
def test_every_group_cut_computes_what_it_does_masked(draw: random.Random):
    model, x = composed(draw)
    note(str(model))
    coupling = find_coupling(model, x[:2])
    assert "hidden" in {group.name for group in coupling.groups}
    assert all(coupling.refused.values())
    assert_every_group_is_right(model, coupling, x)


@settings(max_examples=15, derandomize=True, **OPTIONS)
@given(st.randoms(use_true_random=False))
def test_a_network_that_is_cut_trains(draw: random.Random):
    model, x = composed(draw)
    coupling = find_coupling(model, x[:2])
    generator = torch.Generator().manual_seed(0)
    small = cut(model, coupling, {i: some_of(g, 0.5, generator) for i, g in enumerate(coupling.groups)}).train()
    optimizer = torch.optim.Adam(small.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(F.cross_entropy(small(x), torch.arange(4)))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


@settings(max_examples=10, derandomize=True, **OPTIONS)
@given(st.randoms(use_true_random=False))
def test_finding_changes_nothing(draw: random.Random):
    model, x = composed(draw)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected, state = model(x), torch.get_rng_state()
    first, second = find_coupling(model, x[:2]), find_coupling(model, x[:2])
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(x), expected)
    assert [group.name for group in first.groups] == [group.name for group in second.groups]
    assert first.refused == second.refused
