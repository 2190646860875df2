"""Pruned networks of one's own classes in a file, and back into the class."""

import pytest
import torch
from torch import nn

import flatprune
from flatprune.coupling import find_coupling
from flatprune.cutting import surgery
from flatprune.errors import DamagedError, InputError
from tests.pruning.pruning_networks import NETWORKS, digits


class Counted(nn.Module):
    """Holds numbers of its widths in attributes, a tuple and a dict, and a buffer that its state dict leaves out."""

    def __init__(self):
        super().__init__()
        self.hidden, self.sizes, self.names = 12, (8, 12), {"out": 12}
        self.first, self.last = nn.Linear(64, 12), nn.Linear(12, 10)
        self.register_buffer("mask", torch.rand(12) + 0.5, persistent=False)

    def forward(self, x):
        x = self.first(x.flatten(1)).relu() * self.mask
        return self.last(x.view(-1, self.hidden).view(len(x), self.sizes[1]).view(-1, self.names["out"]))


class Pairs(nn.Module):
    """Takes its neurons in `pieces`, of which one can be left."""

    def __init__(self):
        super().__init__()
        self.pieces = 2
        self.first, self.last = nn.Linear(64, 8), nn.Linear(8, 10)

    def forward(self, x):
        pieces = self.first(x.flatten(1)).view(len(x), self.pieces, 4).softmax(2)
        return self.last(pieces.flatten(1))


def pruned(model):
    coupling = find_coupling(model, digits()[0][:2])
    chosen = {}
    for position, group in enumerate(coupling.groups):  # the first neuron, of grouped ones the first of each slice
        firsts = [(group.group_of == part).nonzero()[:1, 0] for part in range(group.groups)]
        chosen[position] = torch.cat(firsts)
    surgery.plan(model, coupling, chosen).commit()
    return model.eval()


@pytest.mark.parametrize("build", [NETWORKS["attention"], NETWORKS["grouped"], NETWORKS["resnet"], Counted, Pairs])
def test_what_comes_back_computes_the_same(build, tmp_path):
    torch.manual_seed(0)
    model, x = pruned(build()), digits()[0][:4]
    flatprune.save(model, tmp_path / "small.pt")
    torch.manual_seed(1)
    again = flatprune.load(tmp_path / "small.pt", into=build())
    assert not again.training
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert set(torch.load(tmp_path / "small.pt", weights_only=True)) >= {"format", "version", "class", "tensors"}


def test_another_network_or_file_is_refused(tmp_path):
    path = tmp_path / "small.pt"
    flatprune.save(NETWORKS["mlp"](), path)
    with pytest.raises(InputError, match=r"small\.pt: of a torch\.nn\.modules\.container\.Sequential"):
        flatprune.load(path, into=Counted())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match="small"):
        flatprune.load(path, into=NETWORKS["mlp"]())
    with pytest.raises(InputError, match="nowhere"):
        flatprune.load(tmp_path / "nowhere.pt", into=NETWORKS["mlp"]())
