"""Tensors that modules hold as plain attributes, such as fixed positions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import flatprune
from flatprune.coupling import find_coupling
from flatprune.coupling.attributes import held_attributes
from flatprune.cutting.surgery import plan
from tests.coupling.tiny_networks import Net, check

TOKENS = torch.randn(2, 5, 6)


def positioned() -> Net:
    """Tokens with fixed positions added; `scale` is a plain tensor too, which no channel meets."""
    return Net(
        lambda m, x: m.out((m.into(x) + m.places).relu()) * m.scale,
        into=nn.Linear(6, 4),
        out=nn.Linear(4, 3),
        places=torch.randn(5, 4),
        scale=torch.ones(1),
    )


def test_fixed_positions_go_with_their_channels():
    net = positioned()
    stream = {"into": range(4), "places[1]": range(4), "out.weight[1]": range(4)}
    check(net, TOKENS, stream, refused={"out": "output of the model"})
    assert "places" in dict(net.named_buffers()) and "places" not in net.state_dict()


def test_other_tensors_stay_plain_attributes():
    net = positioned()
    find_coupling(net, TOKENS)
    assert "scale" in vars(net) and "scale" not in dict(net.named_buffers())


def test_nothing_is_registered_after_an_error():
    def forward(m: Net, x: Tensor) -> Tensor:
        raise RuntimeError("no")

    net = Net(forward, into=nn.Linear(6, 4), places=torch.randn(5, 4))
    with pytest.raises(ValueError, match="no"):
        find_coupling(net, TOKENS)
    assert "places" in vars(net)


def test_cut_positions_come_back_in_a_fresh_model():
    net = positioned()
    coupling = find_coupling(net, TOKENS)
    averaged = copy.deepcopy(net)
    plan(net, coupling, {0: torch.tensor([1, 3])}, ema_models=[averaged]).commit()
    fresh = positioned()
    flatprune.take_tensors(fresh, net.state_dict(), held_attributes(net, coupling))
    assert fresh.places.shape == averaged.places.shape == (5, 2)
    torch.testing.assert_close(fresh(TOKENS), net(TOKENS), rtol=0, atol=0)


def test_a_copy_made_before_is_cut_too():
    net = positioned()
    early = copy.deepcopy(net)
    coupling = find_coupling(net, TOKENS)
    plan(net, coupling, {0: torch.tensor([0])}, ema_models=[early]).commit()
    torch.testing.assert_close(early(TOKENS), net(TOKENS), rtol=0, atol=0)


class Cached(nn.Module):
    """Keeps positions from one forward to the next, as detectors keep their anchors; its class has one of that name."""

    places, made_for = torch.zeros(0), None

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.made_for != x.shape[1:2]:
            self.places, self.made_for = torch.arange(0.0, x.shape[1])[:, None], x.shape[1:2]
        return self.out((self.into(x) + self.places).relu())


def test_a_cache_of_another_shape_stays_as_it_was():
    net = Cached()
    net(TOKENS[:, :2])
    places = net.places
    assert [group.name for group in find_coupling(net, TOKENS).groups] == ["into"]
    assert net.places is places and net.made_for == (2,) and "places" not in net._buffers
    assert net(TOKENS).shape == (2, 5, 3)
