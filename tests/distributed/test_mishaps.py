"""What goes wrong on one rank is said on all of them."""

import pytest

from tests.distributed import mishaps
from tests.distributed.ranks import Ranks


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("what", ["weight", "step", "settings", "widths"])
def test_ranks_that_differ(two, what):
    names = {"weight": "weights", "settings": "limits"}
    for text, is_unchanged in two.run(getattr(mishaps, f"other_{what}")):
        assert text.startswith(f"RanksError: Pruner: ranks differ in {names.get(what, what)}: "), text
        assert " on rank 0, " in text and is_unchanged


def test_a_call_of_the_pruner_that_one_rank_left_out(two):
    for text, is_unchanged in two.run(mishaps.lost_step):
        assert text == "RanksError: Curvature: ranks differ in step: 3, 2 steps of the pruner" and is_unchanged


def test_batches_of_different_sizes(two):
    for text, _ in two.run(mishaps.other_sizes):
        assert text.startswith("RanksError: Curvature: batches of different sizes on ranks: 5, 6 samples"), text


def test_a_rank_without_samples(two):
    there, here = two.run(mishaps.no_samples, timeout=20.0)
    assert there == "RanksError: Curvature: an update of the factors has failed on another rank, which says why"
    assert here.startswith("ValueError: Curvature: the batch of rank 1 has no samples")


def test_an_update_that_fails_on_one_rank(two):
    there, here = two.run(mishaps.failing_update, timeout=20.0)
    assert there == "RanksError: Curvature: an update of the factors has failed on another rank, which says why"
    assert here == "MemoryError: no memory for labels"


def test_a_batch_that_is_not_finite_on_one_rank(two):
    for stayed, is_finite, warned in two.run(mishaps.not_finite):
        assert stayed and is_finite
        assert len(warned) == 1 and warned[0].startswith("Curvature: 1 update of the factors left out"), warned


def test_one_rank_may_read_alone(two):
    first, second = two.run(mishaps.one_rank_reads)
    assert first == second


def test_layers_that_some_ranks_call(two):
    for distances, scale in two.run(mishaps.some_ranks_call_a_layer):
        assert scale > 1e-6
        assert max(distances.values()) < 1e-14, distances


def test_a_plain_model_among_ranks_warns(two):
    for warned in two.run(mishaps.plain_model):
        assert len(warned) == 1
        assert warned[0].startswith("Curvature: model is a plain Sequential in a group of 2 ranks")


def test_wrapped_models_that_cannot_be_taken(two):
    wanted = [
        "ValueError: Curvature: model is a DistributedDataParallel of a DistributedDataParallel, wrap it once",
        "ValueError: Curvature: model is a DataParallel",
        "ValueError: Pruner: model is a DistributedDataParallel, give the same one to Curvature",
        "ValueError: Pruner: the curvature has the DistributedDataParallel of this model",
        "ValueError: Pruner: model is a DataParallel",
        "ValueError: find_coupling: model is a DistributedDataParallel",
        "ValueError: attach_disout: model is a DistributedDataParallel",
        "ValueError: hessian_lambda_max: model is a DistributedDataParallel",
        "ValueError: AveragedWeights: model is a DistributedDataParallel",
    ]
    for texts in two.run(mishaps.refused):
        for text, start in zip(texts, wanted, strict=True):
            assert text.startswith(start), text
