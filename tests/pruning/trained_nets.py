"""Fixtures of networks that have been trained a little."""

from __future__ import annotations

import pytest
import torch

from tests.found_couplings import couplings_are_kept
from tests.pruning.pruning_networks import NETWORKS, Run, chain, mlp


@pytest.fixture(autouse=True)
def kept_couplings():
    with couplings_are_kept():
        yield


@pytest.fixture(scope="session")
def trained_nets() -> dict[str, Run]:
    """A perceptron and a batch-norm conv net after 200 steps on the digits; to be looked at, not to be changed."""
    nets = {}
    for name, build in (("mlp", lambda: mlp(32, 24)), ("chain", chain)):
        torch.manual_seed(0)
        nets[name] = Run(build())
        nets[name].train(200)
    return nets


@pytest.fixture(scope="session")
def double_nets() -> dict[str, Run]:
    """Networks with every kind of coupling in float64, after a few steps on the digits; not to be changed."""
    nets = {}
    for name in ("mlp", "chain", "resnet", "grouped", "concat"):
        torch.manual_seed(0)
        nets[name] = Run(NETWORKS[name]().double())
        nets[name].train(6, batch=24)
    return nets
