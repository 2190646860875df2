"""Operators that work entry by entry: what meets is one, what is broadcast couples nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatprune.coupling import find_coupling
from tests.coupling.tiny_networks import Net, blocks, check, conv, image, pooled, rows

X = torch.randn(2, 5)
PLAIN = {"a": range(6), "b.weight[1]": range(6)}


def between(operation, **parts) -> Net:
    """A Linear to 6 entries, an operation on (module, [N, 6]), a Linear to 3."""
    return Net(lambda m, x: m.b(operation(m, m.a(x))), a=nn.Linear(5, 6), b=nn.Linear(6, 3), **parts)


def two(operation, **parts) -> Net:
    """Two Linears to 6 entries, an operation on both, a Linear to 3."""
    return Net(
        lambda m, x: m.b(operation(m.a(x), m.c(x))),
        a=nn.Linear(5, 6),
        c=nn.Linear(5, 6),
        b=nn.Linear(6, 3),
        **parts,
    )


@pytest.mark.parametrize(
    "operation",
    [
        F.relu,
        F.gelu,
        F.silu,
        F.elu,
        F.hardswish,
        F.hardsigmoid,
        F.mish,
        F.softplus,
        F.logsigmoid,
        F.leaky_relu,
        F.relu6,
        F.celu,
        F.hardtanh,
        F.softsign,
        F.tanhshrink,
        F.softshrink,
        torch.tanh,
        torch.sigmoid,
        torch.erf,
        torch.exp,
        torch.square,
        lambda x: x.abs().sqrt(),
        lambda x: x.clamp(-1, 1),
        lambda x: x.clamp_min(0.1),
        lambda x: 2 * x + 1,
        lambda x: 1 - x,
        lambda x: x**2 / 3,
        lambda x: x.sign() * x.abs().log1p(),
        lambda x: torch.where(x > 0, x, 0.1 * x),
        lambda x: x.masked_fill(x < 0, 0.5),
        lambda x: F.dropout(x, 0.5, training=False),
        lambda x: torch.nan_to_num(x),
        lambda x: x.to(torch.float64).float(),
        lambda x: x.round().detach() + x,
        lambda x: x + torch.zeros_like(x),
        lambda x: x * torch.ones(x.shape[1]),
        lambda x: torch.lerp(x, x.square(), 0.3),
    ],
)
def test_activations(operation):
    check(between(lambda _m, x: operation(x)), X, PLAIN)


@pytest.mark.parametrize(
    "operation",
    [
        torch.add,
        torch.sub,
        torch.mul,
        torch.maximum,
        torch.hypot,
        lambda x, y: x * y.sigmoid(),
        lambda x, y: torch.where(x > 0, x, y),
        lambda x, y: torch.addcmul(x, x, y),
        lambda x, y: torch.lerp(x, y, y.sigmoid()),
        lambda x, y: x / (1 + y.square()),
        lambda x, y: torch.atan2(x, y),
        lambda x, y: x.masked_fill(y > 0, 0),
        lambda x, y: x.add_(y),
        lambda x, y: torch.stack([x, y]).sum(0),
    ],
)
def test_two_operands_are_one_neuron(operation):
    check(two(operation), X, {"a": range(6), "c": range(6), "b.weight[1]": range(6)})


def test_residual_stream():
    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.a(x)
        return m.out(x + m.narrow(F.relu(m.wide(x))))

    net = Net(forward, a=nn.Linear(5, 6), wide=nn.Linear(6, 8), narrow=nn.Linear(8, 6), out=nn.Linear(6, 3))
    check(
        net,
        X,
        {"a": range(6), "narrow": range(6), "wide.weight[1]": range(6), "out.weight[1]": range(6)},
        {"wide": range(8), "narrow.weight[1]": range(8)},
        refused={"out": "output of the model"},
    )


def test_a_vector_over_the_channels_goes_along():
    """Layer scale, a learned offset, an affine pair: a parameter of the width."""
    for operation in (lambda m, x: x * m.vector, lambda m, x: x + m.vector, lambda m, x: x * (1 + m.vector)):
        check(between(operation, vector=nn.Parameter(torch.randn(6))), X, {**PLAIN, "vector[0]": range(6)})


def test_a_vector_over_the_channels_of_an_image():
    net = Net(
        lambda m, x: pooled(m.b(m.a(x) * m.gamma + m.beta[:, None, None])),
        a=conv(3, 6),
        b=conv(6, 3),
        gamma=nn.Parameter(torch.randn(1, 6, 1, 1)),
        beta=nn.Parameter(torch.randn(6)),
    )
    check(net, image(), {**PLAIN, "gamma[1]": range(6), "beta[0]": range(6)})


def test_a_buffer_over_the_channels_goes_along():
    net = between(lambda m, x: (x - m.mean) * m.scale)
    net.register_buffer("mean", torch.randn(6))
    net.register_buffer("scale", torch.rand(6) + 0.5, persistent=False)
    check(net, X, {**PLAIN, "mean[0]": range(6), "scale[0]": range(6)})


def test_a_parameter_of_positions_and_channels():
    net = Net(
        lambda m, x: m.b(m.a(x) + m.position).mean(1),
        a=nn.Linear(5, 6),
        b=nn.Linear(6, 3),
        position=nn.Parameter(torch.randn(1, 4, 6)),
    )
    check(net, torch.randn(2, 4, 5), {**PLAIN, "position[2]": range(6)})


def test_a_sliced_table_of_positions():
    net = Net(
        lambda m, x: m.b(m.a(x) + m.table[: x.shape[1]]).mean(1),
        a=nn.Linear(5, 6),
        b=nn.Linear(6, 3),
        table=nn.Parameter(torch.randn(9, 6)),
    )
    check(net, torch.randn(2, 4, 5), {**PLAIN, "table[1]": range(6)})


def test_a_number_over_all_channels_couples_nothing():
    check(between(lambda m, x: x * m.scale, scale=nn.Parameter(torch.tensor(0.5))), X, PLAIN)
    check(between(lambda m, x: x * m.scale, scale=nn.Parameter(torch.tensor([0.5]))), X, PLAIN)
    check(between(lambda m, x: m.act(x), act=nn.PReLU()), X, PLAIN)


def test_a_prelu_of_channels_goes_along():
    check(between(lambda m, x: m.act(x), act=nn.PReLU(6)), X, {**PLAIN, "act.weight[0]": range(6)})
    net = Net(lambda m, x: pooled(m.b(m.act(m.a(x)))), a=conv(3, 6), act=nn.PReLU(6), b=conv(6, 3))
    check(net, image(), {**PLAIN, "act.weight[0]": range(6)})


def test_one_channel_broadcast_over_all_couples_nothing():
    """The gate of an attention U-Net: its one channel stays, the gated ones go."""
    net = Net(
        lambda m, x: (lambda h: pooled(m.b(h * torch.sigmoid(m.gate(h)))))(F.relu(m.a(x))),
        a=conv(3, 6),
        gate=conv(6, 1, 1),
        b=conv(6, 3),
    )
    check(net, image(), {**PLAIN, "gate.weight[1]": range(6)})


def test_a_factor_of_every_sample_or_position_couples_nothing():
    check(
        Net(lambda m, x, mask: m.b(m.a(x) * mask[:, :, None]).sum(1), a=nn.Linear(5, 6), b=nn.Linear(6, 3)),
        (torch.randn(2, 4, 5), torch.rand(2, 4)),
        PLAIN,
    )
    check(
        Net(lambda m, x: m.b(m.a(x) * x.mean(1, keepdim=True)), a=nn.Linear(5, 6), b=nn.Linear(6, 3)),
        X,
        PLAIN,
    )


def test_squeeze_and_excite():
    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.a(x)
        gate = torch.sigmoid(m.widen(F.relu(m.narrow(x.mean((2, 3), keepdim=True)))))
        return pooled(m.b(x * gate))

    net = Net(forward, a=conv(3, 6), narrow=conv(6, 4, 1), widen=conv(4, 6, 1), b=conv(6, 3))
    check(
        net,
        image(),
        {"a": range(6), "widen": range(6), "narrow.weight[1]": range(6), "b.weight[1]": range(6)},
        {"narrow": range(4), "widen.weight[1]": range(4)},
    )


def test_highway_gate_shares_the_stream():
    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.a(x)
        gate = torch.sigmoid(m.gate(x))
        return m.b(gate * F.relu(m.value(x)) + (1 - gate) * x)

    net = Net(forward, a=nn.Linear(5, 6), gate=nn.Linear(6, 6), value=nn.Linear(6, 6), b=nn.Linear(6, 3))
    check(
        net,
        X,
        {
            "a": range(6),
            "gate": range(6),
            "value": range(6),
            "gate.weight[1]": range(6),
            "value.weight[1]": range(6),
            "b.weight[1]": range(6),
        },
    )


def test_what_meets_an_input_of_its_width_is_refused():
    net = Net(lambda m, x: m.b(m.a(x) + x), a=nn.Linear(5, 5), b=nn.Linear(5, 3))
    check(net, X, refused={"a": ["input", "add"]})


def test_the_reason_names_operator_and_module():
    inner = Net(lambda m, x: m.a(x) * x.sin(), a=nn.Linear(5, 5))
    net = Net(lambda m, x: m.b(m.body(x)), body=inner, b=nn.Linear(5, 3))
    check(net, X, refused={"body.a": ["mul in body"]})


def test_what_meets_a_constant_of_written_width_is_refused():
    net = between(lambda _m, x: x * torch.linspace(0.5, 1, 6))
    check(net, X, refused={"a": "mul"})


def test_products_of_all_pairs_are_cut_along_one_side_at_most():
    """Column i, j of `b` belongs to entry i of one layer and to entry j of another."""
    net = Net(
        lambda m, x: m.b((m.a(x)[:, :, None] * m.c(x)[:, None]).flatten(1)),
        a=nn.Linear(5, 3),
        c=nn.Linear(5, 4),
        b=nn.Linear(12, 3),
    )
    one_side = {"a": {"a": range(3), "b.weight[1]": blocks(3, 4)}, "c": {"c": range(4), "b.weight[1]": rows(4, 4, 3)}}
    found = [group.name for group in find_coupling(net, X).groups]
    assert len(found) <= 1
    check(net, X, *(one_side[name] for name in found))


@pytest.mark.parametrize(
    "operation",
    [
        lambda _m, x: x + torch.randn_like(x),
        lambda _m, x: F.dropout(x, 0.4, training=True),
        lambda _m, x: x * torch.bernoulli(torch.full_like(x, 0.7)),
        lambda m, x: F.alpha_dropout(x, 0.3, m.training),
        lambda m, x: F.rrelu(x, training=m.training),
        lambda _m, x: x + torch.randn(x.shape),
        lambda _m, x: x * (torch.rand(len(x), 1) > 0.2),
        lambda _m, x: x + torch.randint(0, 3, x.shape),
        lambda _m, x: torch.normal(x, 0.1),
    ],
    ids=["randn_like", "dropout", "bernoulli", "alpha_dropout", "rrelu", "randn", "rows", "randint", "normal"],
)
def test_random_numbers_of_the_width_adapt(operation):
    check(between(operation), X, PLAIN)


def test_weights_of_parallel_branches():
    """A mixture: each branch times one number, the numbers from a softmax over a parameter."""
    net = Net(
        lambda m, x: m.b(sum(w * layer(x) for w, layer in zip(m.mix.softmax(0), (m.a, m.c)))),
        a=nn.Linear(5, 6),
        c=nn.Linear(5, 6),
        b=nn.Linear(6, 3),
        mix=nn.Parameter(torch.randn(2)),
    )
    check(net, X, {"a": range(6), "c": range(6), "b.weight[1]": range(6)})
