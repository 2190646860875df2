"""After a cut the DDP that the user made goes on, whatever he made it with."""

import pytest

from tests.conftest import thorough
from tests.distributed.ranks import Ranks
from tests.distributed.training_loops import compare

EMPIRICAL, CONV, NORMED, SAM = (
    {"fisher": "empirical"},
    {"network": "conv"},
    {"network": "normed"},
    {"sam": True, "flat": False},
)
WAYS = {
    "static_graph": (CONV, "plain", {"static_graph": True}),
    "static_graph_empirical": (EMPIRICAL, "plain", {"static_graph": True}),
    "static_graph_sam": (SAM, "plain", {"static_graph": True}),
    "unused_parameters": ({}, "plain", {"find_unused_parameters": True}),
    "bucket_views_of_a_size": (CONV, "plain", {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.001}),
    "own_group": ({}, "own_group", {}),
    "communication_hook": (CONV, "communication_hook", {}),
    "subclass_with_hooks": ({}, "subclass", {"static_graph": True}),
}


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("name", thorough(WAYS, but=["static_graph", "unused_parameters", "communication_hook"]))
def test_the_same_as_one_process(two, name):
    found = two.run(compare, *WAYS[name])[0]
    assert found["same_neurons"] and found["ranks_alike"] and found["removed"] > 3, found
    assert found["distance"] < 1e-12, found
    assert found["class"] == ("Wrapped" if "subclass" in name else "DistributedDataParallel")
    assert found["kept"] == (24 if name in ("communication_hook", "subclass_with_hooks") else 0)


@pytest.mark.parametrize("broadcast", [True, False])
def test_batch_norms_are_alike_after_an_event(two, broadcast):
    found = two.run(compare, NORMED, "plain", {"broadcast_buffers": broadcast})[0]
    assert found["ranks_alike"] and found["removed"] > 3


def test_power_sgd_goes_on(two):
    """Compressed gradients are not those of one process, but those of all ranks."""
    found = two.run(compare, CONV, "power_sgd")[0]
    assert found["ranks_alike"] and found["events"] > 2
