"""Multiply and sum: what is summed over is read, the rest of a parameter makes the result."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatprune.coupling import find_coupling
from tests.coupling.tiny_networks import Net, blocks, check, image, rows

X = torch.randn(2, 5)
PLAIN = {"a": range(6), "b.weight[1]": range(6)}


class Transposed(nn.Module):
    """A Linear whose weight is [in, out], as GPT-2 has it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.weight.shape[1])


def test_linear_over_any_leading_dimensions():
    for shape in ((5,), (2, 5), (2, 3, 5), (2, 3, 4, 5)):
        check(Net(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Linear(5, 6), b=nn.Linear(6, 3)), torch.randn(shape), PLAIN)


def test_a_weight_stored_the_other_way_round():
    check(
        Net(lambda m, x: m.b(F.relu(m.a(x))), a=Transposed(5, 6), b=Transposed(6, 3)),
        torch.randn(2, 4, 5),
        {"a.weight[1]": range(6), "a.bias[0]": range(6), "b.weight[0]": range(6)},
        refused={"b": "output of the model"},
    )


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: x @ w,
        lambda x, w: torch.matmul(x, w),
        lambda x, w: torch.einsum("bti,io->bto", x, w),
        lambda x, w: torch.einsum("io,bti->bto", w, x),
        lambda x, w: torch.tensordot(x, w, 1),
        lambda x, w: torch.bmm(x, w.expand(len(x), -1, -1)),
        lambda x, w: F.linear(x, w.t()),
        lambda x, w: (w.t() @ x.mT).mT,
        lambda x, w: torch.baddbmm(torch.zeros(1, 1, 1), x, w.expand(len(x), -1, -1)),
    ],
    ids=["matmul_operator", "matmul", "einsum", "einsum_left", "tensordot", "bmm", "linear", "left", "baddbmm"],
)
def test_a_bare_parameter_as_a_matrix(product):
    net = Net(
        lambda m, x: product(F.relu(product(x, m.first)), m.second),
        first=nn.Parameter(torch.randn(5, 6)),
        second=nn.Parameter(torch.randn(6, 3)),
    )
    check(net, torch.randn(2, 4, 5), {"first[1]": range(6), "second[0]": range(6)})


def test_products_of_activations_read_both():
    """Keys and queries of one head: entry i of both goes; values are neurons of their own."""

    def forward(m: Net, x: Tensor) -> Tensor:
        return m.out((m.query(x) @ m.key(x).mT).softmax(-1) @ m.value(x)).mean(1)

    net = Net(forward, query=nn.Linear(5, 4), key=nn.Linear(5, 4), value=nn.Linear(5, 6), out=nn.Linear(6, 3))
    check(
        net,
        torch.randn(2, 4, 5),
        {"query": range(4), "key": range(4)},
        {"value": range(6), "out.weight[1]": range(6)},
    )


def test_an_adjacency_mixes_nodes_not_channels():
    net = Net(lambda m, x, a: m.b(a @ F.relu(a @ m.a(x))), a=nn.Linear(5, 6), b=nn.Linear(6, 3))
    check(net, (torch.randn(7, 5), torch.rand(7, 7)), PLAIN)
    check(net, (torch.randn(7, 5), (torch.rand(7, 7) > 0.5).float().to_sparse()), PLAIN)


def test_an_input_as_a_matrix_over_channels_is_refused():
    net = Net(lambda m, x, w: m.b(m.a(x) @ w), a=nn.Linear(5, 6), b=nn.Linear(4, 3))
    check(net, (X, torch.randn(6, 4)), refused={"a": ["mm", "input"]})


def test_mixing_of_tokens():
    """MLP-Mixer: the hidden width of the mixing over tokens, of that over channels, and the stream."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.embed(x)
        x = x + m.back(F.gelu(m.tokens(x.mT))).mT
        x = x + m.narrow(F.gelu(m.wide(x)))
        return m.out(x.mean(1))

    net = Net(
        forward,
        embed=nn.Linear(5, 6),
        tokens=nn.Linear(4, 7),
        back=nn.Linear(7, 4),
        wide=nn.Linear(6, 8),
        narrow=nn.Linear(8, 6),
        out=nn.Linear(6, 3),
    )
    check(
        net,
        torch.randn(2, 4, 5),
        {"embed": range(6), "narrow": range(6), "wide.weight[1]": range(6), "out.weight[1]": range(6)},
        {"tokens": range(7), "back.weight[1]": range(7)},
        {"wide": range(8), "narrow.weight[1]": range(8)},
        refused={"back": ["input"]},
    )


def test_a_weight_used_again_transposed():
    """A tied autoencoder: its rows are made and read by the same tensor."""
    net = Net(lambda m, x: F.linear(F.relu(m.a(x)), m.a.weight.t()), a=nn.Linear(5, 6))
    coupling = check(net, X, {"a": range(6)})
    (weight,) = [member for member in coupling.groups[0].members if member.names == ("a.weight",)]
    assert weight.roles >= {"producer", "consumer"}


def test_tied_weights_of_two_layers():
    """Two square layers with one weight: what the first makes the second reads and makes."""
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    net = nn.Sequential(nn.Linear(5, 6), first, nn.ReLU(), second, nn.Linear(6, 3))
    coupling = check(
        net,
        X,
        {
            "0": range(6),
            "1.weight[0]": range(6),
            "1.weight[1]": range(6),
            "1.bias[0]": range(6),
            "3.bias[0]": range(6),
            "4.weight[1]": range(6),
        },
    )
    (tied,) = [m for m in coupling.groups[0].members if m.names[0] == "1.weight" and m.dim == 0]
    assert tied.names == ("1.weight", "3.weight")


def test_a_layer_called_twice():
    net = Net(
        lambda m, x: m.b(F.relu(m.twice(F.relu(m.twice(m.a(x)))))),
        a=nn.Linear(5, 6),
        twice=nn.Linear(6, 6),
        b=nn.Linear(6, 3),
    )
    check(net, X, {**PLAIN, "twice": range(6), "twice.weight[1]": range(6)})


def test_low_rank_updates():
    """LoRA: the rank is a neuron too, though its second matrix starts at zero."""

    def forward(m: Net, x: Tensor) -> Tensor:
        return m.b(m.a(x) + m.up(m.down(x)))

    net = Net(
        forward, a=nn.Linear(5, 6), down=nn.Linear(5, 4, bias=False), up=nn.Linear(4, 6, bias=False), b=nn.Linear(6, 3)
    )
    nn.init.zeros_(net.up.weight)
    check(net, X, {**PLAIN, "up": range(6)}, {"down": range(4), "up.weight[1]": range(4)})
    assert not net.up.weight.any()


def test_a_bilinear_form_is_cut_or_refused_by_name():
    net = Net(
        lambda m, x: m.b(m.form(m.a(x), m.c(x))),
        a=nn.Linear(5, 6),
        c=nn.Linear(5, 4),
        form=nn.Bilinear(6, 4, 7),
        b=nn.Linear(7, 3),
    )
    coupling = find_coupling(net, X)
    reasons = [coupling.refused[name] for name in ("a", "c", "form") if name in coupling.refused]
    assert all("_trilinear" in reason for reason in reasons)
    assert len(reasons) + len(coupling.groups) == 3


def test_a_hypernetwork():
    """A weight that a layer makes: neurons of its rows are blocks of that layer's rows."""
    net = Net(
        lambda m, x, z: m.out(F.linear(x, m.hyper(z).view(-1, 5))),
        hyper=nn.Linear(4, 30),
        out=nn.Linear(6, 3),
    )
    check(net, (X, torch.randn(4)), {"hyper": blocks(6, 5), "out.weight[1]": range(6)})


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions(dims):
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    x = torch.randn(2, 3, *[6] * dims)

    def net(*middle: nn.Module) -> nn.Sequential:
        return nn.Sequential(*middle, nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 2))

    expected = {"0": range(6), "2.weight[1]": range(6)}, {"2": range(4), "6.weight[1]": range(4)}
    check(net(layer(3, 6, 3), nn.ReLU(), layer(6, 4, 3, padding=1, stride=2)), x, *expected)
    check(net(layer(3, 6, 1), nn.ReLU(), layer(6, 4, 3, padding=2, dilation=2, padding_mode="circular")), x, *expected)
    check(
        net(
            layer(3, 6, 3, padding="same", padding_mode="reflect" if dims < 3 else "replicate"),
            nn.ReLU(),
            layer(6, 4, 2),
        ),
        x,
        *expected,
    )


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_convolutions(dims):
    plain = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    net = nn.Sequential(plain(3, 6, 3), nn.ReLU(), layer(6, 4, 2, stride=2), nn.ReLU(), plain(4, 2, 1))
    check(
        net,
        torch.randn(2, 3, *[5] * dims),
        {"0": range(6), "2.weight[0]": range(6)},
        {"2.weight[1]": range(4), "2.bias[0]": range(4), "4.weight[1]": range(4)},
    )


def test_an_unbatched_image():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))
    check(net, torch.randn(3, 8, 8), {"0": range(6), "2.weight[1]": range(6)})


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_depthwise_convolution_goes_along(dims):
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    net = nn.Sequential(layer(3, 6, 1), layer(6, 6, 3, groups=6), layer(6, 2, 1))
    coupling = check(net, torch.randn(2, 3, *[5] * dims), {"0": range(6), "1": range(6), "2.weight[1]": range(6)})
    (weight,) = [member for member in coupling.groups[0].members if member.names == ("1.weight",)]
    assert weight.roles == {"channelwise"}


def test_a_transposed_depthwise_convolution_goes_along():
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 6, 3, groups=6), nn.Conv2d(6, 2, 1))
    check(net, image(), {"0": range(6), "1": range(6), "2.weight[1]": range(6)})


def test_a_depthwise_convolution_with_several_outputs_a_channel():
    """Channel i makes outputs 2 i and 2 i + 1; the number of groups follows."""
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 12, 3, groups=6), nn.Conv2d(12, 2, 1))
    check(net, image(), {"0": range(6), "1": blocks(6, 2), "2.weight[1]": blocks(6, 2)})


SIXES = {"slices": [0, 0, 0, 1, 1, 1]}


def test_a_grouped_convolution_asks_for_equal_slices():
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 3, groups=2), nn.Conv2d(8, 2, 1))
    coupling = check(
        net,
        image(),
        {"0": range(6), "1.weight[1]": range(6), **SIXES},
        {"1": range(8), "2.weight[1]": range(8), "slices": [0] * 4 + [1] * 4},
    )
    (reader,) = coupling.groups[0].of_role("consumer")
    assert (reader.dim, reader.groups, reader.names) == (1, 2, ("1.weight",))


def test_a_grouped_transposed_convolution_asks_for_equal_slices():
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 8, 3, groups=2), nn.Conv2d(8, 2, 1))
    coupling = check(
        net,
        image(),
        {"0": range(6), "1.weight[0]": range(6), **SIXES},
        {"1.weight[1]": range(8), "1.bias[0]": range(8), "2.weight[1]": range(8), "slices": [0] * 4 + [1] * 4},
    )
    (maker,) = coupling.groups[1].of_role("producer")
    assert (maker.dim, maker.groups) == (1, 2)


def test_grouped_convolutions_in_a_row():
    """Slices of two grouped convolutions, of which one is finer."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 1, groups=4), nn.Conv2d(4, 2, 1)
    )
    check(
        net,
        image(),
        {"0": range(8), "1.weight[1]": range(8), "slices": [0] * 4 + [1] * 4},
        {"1": range(8), "3.weight[1]": range(8), "slices": [0, 0, 1, 1, 2, 2, 3, 3]},
    )


def test_grouped_convolution_of_a_concatenation():
    """Each half of the input of a grouped convolution comes from a layer of its own: whole groups of unequal makers."""
    net = Net(
        lambda m, x: m.out(m.grouped(torch.cat([m.a(x), m.b(x)], 1))),
        a=nn.Conv2d(3, 4, 1),
        b=nn.Conv2d(3, 4, 1),
        grouped=nn.Conv2d(8, 6, 1, groups=2),
        out=nn.Conv2d(6, 2, 1),
    )
    found = {group.name: group for group in find_coupling(net, image()).groups}
    assert found["grouped"].groups == 2
    # both halves must lose equally many: one neuron of each together
    halves = {"a": range(4), "b": range(4), "grouped.weight[1]": rows(4, 4)}
    check(net, image(), halves, {"grouped": range(6), "out.weight[1]": range(6), **SIXES})


def shuffled(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


@pytest.mark.parametrize(
    ("width", "groups", "stays"), [(12, 2, ()), (24, 3, (2, 5))], ids=["even columns", "columns across bounds"]
)
def test_a_shuffle_between_grouped_convolutions(width, groups, stays):
    """A channel of each group goes, those at one place; those that the next convolution has in two groups stay."""
    net = Net(
        lambda m, x: m.b(shuffled(m.a(x), groups)),
        a=nn.Conv2d(2 * groups, width, 1, groups=groups),
        b=nn.Conv2d(width, 2 * groups, 1, groups=groups),
    )
    of_group = width // groups
    columns = [j for j in range(of_group) if j not in stays]
    own = [tuple(j + of_group * group for group in range(groups)) for j in columns]
    read = [tuple(groups * j + group for group in range(groups)) for j in columns]
    slices = [groups * j // of_group for j in columns]
    check(net, image(2 * groups), {"a": own, "b.weight[1]": read, "slices": slices})


def test_grouped_convolution_of_unequal_parts():
    """The first group reads both layers, the second one of them: channels at one place of both groups go together."""
    net = Net(
        lambda m, x: m.grouped(torch.cat([m.a(x), m.b(x)], 1)),
        a=nn.Conv2d(3, 2, 1),
        b=nn.Conv2d(3, 10, 1),
        grouped=nn.Conv2d(12, 4, 1, groups=2),
    )
    both = {"a": range(2), "b": range(4, 6), "grouped.weight[1]": [(0, 6), (1, 7)]}
    check(net, image(), both, {"b": [(i, 6 + i) for i in range(4)], "grouped.weight[1]": rows(4, 6, start=2)})


def test_a_convolution_by_a_parameter_of_the_model():
    net = Net(
        lambda m, x: F.conv2d(F.relu(F.conv2d(x, m.first, m.shift)), m.second, padding=1),
        first=nn.Parameter(torch.randn(6, 3, 1, 1)),
        shift=nn.Parameter(torch.randn(6)),
        second=nn.Parameter(torch.randn(2, 6, 3, 3)),
    )
    check(net, image(), {"first[0]": range(6), "shift[0]": range(6), "second[1]": range(6)})


def test_a_blur_by_a_constant_kernel():
    """Anti-aliasing: a depthwise convolution whose one kernel is expanded to the width of what it blurs."""
    net = Net(
        lambda m, x: m.b(F.conv2d(m.a(x), torch.ones(m.a(x).shape[1], 1, 3, 3) / 9, groups=m.a(x).shape[1])),
        a=nn.Conv2d(3, 6, 1),
        b=nn.Conv2d(6, 2, 1),
    )
    coupling = find_coupling(net, image())
    assert not coupling.groups
    assert "the weight of a grouped convolution is computed" in coupling.refused["a"]
