"""Norms: their vectors go along; those that take statistics over channels take them over the survivors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from flatprune.coupling import find_coupling
from tests.coupling.tiny_networks import Net, blocks, check, conv, image, pooled

PLAIN = {"a": range(6), "b.weight[1]": range(6)}
NORMED = {**PLAIN, "norm": range(6)}


def images(norm: nn.Module, channels: int = 6) -> Net:
    return Net(lambda m, x: pooled(m.b(F.relu(m.norm(m.a(x))))), a=conv(3, channels), norm=norm, b=conv(channels, 3))


def vectors(norm: nn.Module) -> Net:
    return Net(lambda m, x: m.b(F.relu(m.norm(m.a(x)))), a=nn.Linear(5, 6), norm=norm, b=nn.Linear(6, 3))


@pytest.mark.parametrize("dims", [0, 1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}])
def test_batch_norms(dims, options):
    norm = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims](6, **options)
    maker = (nn.Linear(5, 6), nn.Conv1d(5, 6, 3), nn.Conv2d(5, 6, 3), nn.Conv3d(5, 6, 3))[dims]
    reader = (nn.Linear(6, 2), nn.Conv1d(6, 2, 1), nn.Conv2d(6, 2, 1), nn.Conv3d(6, 2, 1))[dims]
    net = Net(lambda m, x: m.b(m.norm(m.a(x))), a=maker, norm=norm, b=reader)
    check(net, torch.randn(4, 5, *[4] * dims), {**PLAIN, "norm": range(6)})


def test_a_batch_norm_behind_a_flatten():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.BatchNorm1d(4 * 16), nn.ReLU(), nn.Linear(4 * 16, 2))
    check(net, image(), {"0": range(4), "2": blocks(4, 16), "4.weight[1]": blocks(4, 16)})


def test_one_batch_norm_behind_two_layers():
    net = Net(
        lambda m, x: m.b(m.norm(m.c(m.norm(m.a(x))))),
        a=nn.Linear(5, 6),
        c=nn.Linear(6, 6),
        norm=nn.BatchNorm1d(6),
        b=nn.Linear(6, 3),
    )
    check(net, torch.randn(4, 5), {**NORMED, "c": range(6), "c.weight[1]": range(6)})


@pytest.mark.parametrize("options", [{}, {"affine": True}, {"affine": True, "track_running_stats": True}])
def test_instance_norms(options):
    check(images(nn.InstanceNorm2d(6, **options)), image(), {**PLAIN, "norm": range(6)})


class NormAndActivation(nn.BatchNorm2d):
    """timm's: the activation is inside, and more."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class FrozenNorm(nn.Module):
    """Detection backbones': four buffers and no parameters."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (t.reshape(1, -1, 1, 1) for t in self.buffers())
        scale = weight * (var + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


class ChannelsFirstNorm(nn.LayerNorm):
    """ConvNeXt's layer norm over dimension 1."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ConditionalNorm(nn.Module):
    """A batch norm without vectors of its own; gain and shift are made from the pooled image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.make = nn.Linear(3, 2 * channels)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gain, shift = self.make(condition).chunk(2, 1)
        return self.norm(x) * (1 + gain[..., None, None]) + shift[..., None, None]


@pytest.mark.parametrize("norm", [NormAndActivation, FrozenNorm, ChannelsFirstNorm])
def test_norms_of_others(norm):
    check(images(norm(6)), image(), NORMED)


def test_a_conditional_norm():
    net = Net(lambda m, x: pooled(m.b(m.norm(m.a(x), pooled(x)))), a=conv(3, 6), norm=ConditionalNorm(6), b=conv(6, 3))
    halves = [(i, i + 6) for i in range(6)]
    check(net, image(), {**PLAIN, "norm.norm": range(6), "norm.make": halves})


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}])
def test_layer_norms(options):
    check(vectors(nn.LayerNorm(6, **options)), torch.randn(2, 5), NORMED)
    check(vectors(nn.LayerNorm(6, **options)), torch.randn(2, 4, 5), NORMED)


@pytest.mark.parametrize("options", [{}, {"elementwise_affine": False}, {"eps": 1e-6}])
def test_root_mean_square_norms(options):
    check(vectors(nn.RMSNorm(6, **options)), torch.randn(2, 4, 5), NORMED)


class HandWritten(nn.Module):
    """Llama's RMSNorm, computed in float32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * x.to(dtype)


def test_a_norm_by_hand():
    check(vectors(HandWritten(6)), torch.randn(2, 4, 5), NORMED)


def test_a_layer_norm_over_positions_too():
    """Statistics and vectors over [C, H, W]: cut along the channels."""
    check(images(nn.LayerNorm((6, 6, 6))), image(), NORMED)


def test_a_layer_norm_over_positions_alone():
    net = Net(lambda m, x: m.b(m.norm(m.a(x)).mean(2)), a=nn.Conv1d(5, 6, 1), norm=nn.LayerNorm(4), b=nn.Linear(6, 3))
    check(net, torch.randn(2, 5, 4), PLAIN)


def test_a_group_norm_asks_for_equal_slices():
    check(images(nn.GroupNorm(2, 6)), image(), {**NORMED, "slices": [0, 0, 0, 1, 1, 1]})
    check(images(nn.GroupNorm(3, 6)), image(), {**NORMED, "slices": [0, 0, 1, 1, 2, 2]})
    check(images(nn.GroupNorm(2, 6, affine=False)), image(), {**PLAIN, "slices": [0, 0, 0, 1, 1, 1]})


def test_a_group_norm_of_one_or_of_all_asks_for_nothing():
    check(images(nn.GroupNorm(1, 6)), image(), NORMED)
    check(images(nn.GroupNorm(6, 6)), image(), NORMED)


def test_nested_slices_take_the_finer_crossed_ones_stay():
    def stack(first: int, second: int) -> nn.Module:
        norms = {"one": nn.GroupNorm(first, 12), "two": nn.GroupNorm(second, 12)}
        forward = lambda m, x: pooled(m.b(m.two(F.relu(m.one(m.a(x))))))  # noqa: E731
        return Net(forward, a=conv(3, 12), b=conv(12, 3), **norms)

    own = {"a": range(12), "one": range(12), "two": range(12), "b.weight[1]": range(12)}
    for first, second in ((2, 4), (4, 2)):
        check(stack(first, second), image(), {**own, "slices": [i // 3 for i in range(12)]})
    check(stack(1, 12), image(), own)
    check(stack(4, 3), image(), refused={"a": ["native_group_norm in one", "native_group_norm in two"]})


def test_functional_norms_with_parameters_of_the_model():
    net = Net(
        lambda m, x: pooled(m.b(F.batch_norm(m.a(x), m.mean, m.var, m.gain, m.shift, m.training))),
        a=conv(3, 6),
        b=conv(6, 3),
        gain=nn.Parameter(torch.rand(6) + 0.5),
        shift=nn.Parameter(torch.randn(6)),
    )
    net.register_buffer("mean", torch.randn(6))
    net.register_buffer("var", torch.rand(6) + 0.5)
    check(net, image(), {**PLAIN, **{f"{name}[0]": range(6) for name in ("mean", "var", "gain", "shift")}})


def test_gains_of_zero_hide_nothing():
    """A residual branch that starts at zero is proven all the same."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.a(x)
        return pooled(m.b(x + m.norm(m.c(F.softmax(x, 1)))))

    net = Net(forward, a=conv(3, 6), c=conv(6, 6), norm=nn.BatchNorm2d(6), b=conv(6, 3))
    nn.init.zeros_(net.norm.weight)
    check(net, image(), refused={"a": "softmax"})
    roll = Net(
        lambda m, x: pooled(m.b(m.a(x) + m.gain * m.a(x).roll(1, 1))),
        a=conv(3, 6),
        b=conv(6, 3),
        gain=nn.Parameter(torch.zeros(1)),
    )
    check(roll, image(), refused={"a": ""})
    assert float(roll.gain) == 0


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_computed_weights(wrap):
    """What a norm of a weight knows of each row and column goes with it."""
    net = Net(lambda m, x: m.b(F.relu(m.a(x))), a=wrap(nn.Linear(5, 6)), b=wrap(nn.Linear(6, 3)))
    (group,) = find_coupling(net, torch.randn(2, 5)).groups
    found = {name: member.dim for member in group.members for name in member.names}
    sized = {name: list(t.shape).index(6) for name, t in {**net.state_dict()}.items() if 6 in t.shape}
    assert group.name == "a" and group.width == 6 and found == sized


def test_standardised_weights():
    """Each row of a weight has mean 0 and deviation 1 over the channels it reads."""

    def standard(w: Tensor) -> Tensor:
        return (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-6)

    net = Net(
        lambda m, x: pooled(F.conv2d(F.relu(F.conv2d(x, standard(m.a.weight))), standard(m.b.weight))),
        a=conv(3, 6, bias=False),
        b=conv(6, 3, bias=False),
    )
    check(net, image(), PLAIN)


@pytest.mark.parametrize("widths", [(8, 8), (8, 16)])
def test_group_norm_of_a_concatenation(widths):
    """No slice of the norm holds both parts, so that neurons of one part go with neurons of the other."""
    first, second = widths
    total = first + second
    groups = total // 4
    net = Net(
        lambda m, x: pooled(m.b(F.relu(m.norm(torch.cat([m.a(x), m.c(x)], 1))))),
        a=conv(3, first),
        c=conv(3, second),
        norm=nn.GroupNorm(groups, total),
        b=conv(total, 3),
    )
    times = second // first
    neurons = [(i, *(first + i + 8 * k for k in range(times))) for i in range(8)]
    own = {"norm": neurons, "b.weight[1]": neurons}
    check(
        net,
        image(),
        {
            "a": range(8),
            "c": [tuple(i + 8 * k for k in range(times)) for i in range(8)],
            **own,
            "slices": [0] * 4 + [1] * 4,
        },
    )
