"""Several ranks on a GPU: two on one card by gloo, one by NCCL."""

import multiprocessing
import socket

import pytest
import torch

from tests.distributed import gpus
from tests.distributed.ranks import Ranks
from tests.distributed.training_loops import compare

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_two_ranks_on_one_card(network):
    ranks = Ranks(2)
    try:
        found = ranks.run(compare, {"network": network, "device": "cuda", "seed": 1})[0]
    finally:
        ranks.close()
    assert found["same_neurons"] and found["ranks_alike"] and found["removed"] > 3
    assert found["distance"] < 1e-10, found


def test_one_rank_by_nccl():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply_async(gpus.one_by_nccl, (port,)).get(timeout=120)
    assert all(all(said) for said in found.values()), found
