"""The host's part of an update: nothing is launched, and the way of CUDA tensors is left again."""

import torch

from bench import worksets
from bench.gpu import host_time
from bench.gpu.covariance import Covariances


def test_nothing_is_launched_and_all_is_as_before():
    layers = [worksets.conv("first", 2, 3, 4, 6), worksets.conv("second", 2, 4, 4, 6)]
    work = Covariances(layers, torch.device("cpu"))
    factors, updates = work.factors, work.updates()
    with host_time.no_launches():
        factors.accumulate_(updates)
        assert not factors.buffer.any()
    factors.accumulate_(updates)
    assert all(factors[key].any() for key in factors)
    assert torch.isfinite(factors.buffer).all()
