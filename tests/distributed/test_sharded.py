"""FSDP2: at an event gathered, cut and sharded anew."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from flatprune.export import take_tensors
from tests.distributed import sharded
from tests.distributed.ranks import Ranks
from tests.distributed.training_loops import conv


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_same_as_one_process(two, optimizer):
    for distance, kept, removed, alone in two.run(sharded.compare, optimizer):
        assert removed == alone and sum(map(len, removed)) > 3
        assert distance < 1e-12 and kept < 1e-12


def test_what_cannot_be_sharded(two):
    for modes, ranks, late in two.run(sharded.refused):
        assert "'double_backward' differentiates through weights that FSDP2 has freed" in modes
        assert "the curvature knows of no ranks" in ranks
        assert late.startswith("Pruner: 0.weight is sharded over ranks (fully_shard)")


def test_pruned_shards_load_on_one_rank(two, tmp_path):
    weights, _ = two.run(sharded.saved, str(tmp_path))
    sizes = FileSystemReader(str(tmp_path)).read_metadata().state_dict_metadata
    state = {name: torch.empty(found.size, dtype=torch.float64) for name, found in sizes.items()}
    dcp.load(state, checkpoint_id=str(tmp_path), no_dist=True)
    model = conv().double()
    take_tensors(model, state)
    assert all(torch.equal(p, torch.from_numpy(weights[name])) for name, p in model.named_parameters())
