"""W ranks that share a batch do what one process does with the whole batch."""

import pytest
import torch

from tests.conftest import thorough
from tests.distributed.ranks import Ranks
from tests.distributed.training_loops import compare, compare_shifted, compare_with_shared_work

DISTANCE = 1e-12  # of weights and factors, in float64

LOOPS = {
    "mlp": {},
    "mlp_empirical": {"fisher": "empirical"},
    "mlp_adam_double_backward": {"optimizer": "adam", "mode": "double_backward"},
    "conv_greedy": {"network": "conv"},
    "conv_empirical_expand": {"network": "conv", "fisher": "empirical", "approx": "expand", "seed": 1},
    "conv_expand": {"network": "conv", "approx": "expand", "criterion": "obd"},
    "taylor": {"criterion": "taylor"},
    "gate_fisher": {"criterion": "gate_fisher"},
    "kron_obs": {"network": "conv", "criterion": "kron_obs"},
    "c_obs": {"criterion": "c_obs"},
    "random": {"criterion": "random", "flat": False},
    "banzhaf": {"criterion": ("banzhaf", 40), "flat": False},
    "fpgm": {"criterion": "fpgm", "compensate": True},
    "mse": {"loss": "mse", "flat": False},
    "sam": {"sam": True, "flat": False},
    "preconditioner": {"network": "conv", "preconditioned": True, "flat": False, "target": None},
    "accumulation": {"parts": 2, "flat": False, "fisher": "empirical"},
    "neurons_together": {"network": "conv", "round_to": 2, "tie_widths": True, "max_predicted_loss": 0.5},
}
CHOSEN = ("mlp", "conv_greedy")  # for other numbers of ranks


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def check(found, options):
    found = found[0]
    assert found["same_neurons"] and found["ranks_alike"], found
    assert found["removed"] > 3 or options.get("target", 1) is None
    assert found["distance"] < DISTANCE, found


SELDOM = ("mlp_empirical", "conv_expand", "gate_fisher", "kron_obs", "random", "banzhaf", "fpgm", "mse")


@pytest.mark.parametrize("name", thorough(LOOPS, seldom=SELDOM))
def test_two_ranks(two, name):
    check(two.run(compare, LOOPS[name]), LOOPS[name])


def test_ranks_in_float32_stay_equal(two):
    found = two.run(compare, {"dtype": torch.float32})[0]
    assert found["ranks_alike"] and found["removed"] > 3
    assert found["same_neurons"] and found["distance"] < 1e-4


@pytest.mark.parametrize("name", ["conv_greedy", "kron_obs", "c_obs", "preconditioner", "conv_expand"])
def test_shared_inverses_and_scores(two, name):
    check(two.run(compare_with_shared_work, LOOPS[name]), LOOPS[name])


def test_an_optimum_is_shifted_by_the_whole_batch(two):
    (distance, moved, weights), (*_, others) = two.run(compare_shifted)
    assert distance < DISTANCE and moved > 1e-3
    assert weights == others


@pytest.mark.thorough
@pytest.mark.parametrize("size", [3, 4])
def test_more_ranks(size):
    ranks = Ranks(size)
    try:
        for name in CHOSEN:
            check(ranks.run(compare, LOOPS[name]), LOOPS[name])
    finally:
        ranks.close()


def test_ranks_with_unequal_threads_stay_equal():
    ranks = Ranks(2, threads=[1, 2])
    try:
        for name in CHOSEN:
            found = ranks.run(compare, LOOPS[name])[0]
            assert found["ranks_alike"] and found["same_neurons"]
    finally:
        ranks.close()
