"""One process has nothing of the ranks."""

import sys

import torch
import torch.nn.functional as F

from kfac_ext import Curvature
from kfac_ext.distributed import shared_work
from tests.distributed.training_loops import IMAGE, mlp

OF_RANKS = ("kfac_ext.distributed", "kfac_ext.curvature.shared")


def test_nothing_of_it_is_imported(monkeypatch):
    for name in OF_RANKS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    model = mlp()
    curvature = Curvature(model)
    F.cross_entropy(model(torch.randn(4, *IMAGE)), torch.tensor([0, 1, 2, 3])).backward()
    assert curvature.spectral_radius() > 0 and curvature.group is None
    assert not [name for name in OF_RANKS if name in sys.modules]


def test_work_is_shared_by_cost():
    costs = [1.0, 8.0, 3.0, 3.0, 2.0]
    assert shared_work(costs, 2) == [0, 0, 1, 1, 1]
    assert shared_work(costs, 1) == [0] * 5
