"""Writing to views: what is written into a part of a tensor is part of it from then on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.coupling.tiny_networks import Net, check, conv, image, pooled

X = torch.randn(2, 5)
TOKENS = torch.randn(2, 4, 5)
PLAIN = {"a": range(6), "b.weight[1]": range(6)}


def test_in_place_operators_on_the_whole():
    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.a(x).relu_().mul_(2).add_(1)
        x *= m.gain
        x += m.c(x)
        return m.b(F.dropout(x, 0.5, False, inplace=True))

    net = Net(forward, a=nn.Linear(5, 6), c=nn.Linear(6, 6), b=nn.Linear(6, 3), gain=nn.Parameter(torch.rand(6)))
    check(net, X, {**PLAIN, "c": range(6), "c.weight[1]": range(6), "gain[0]": range(6)})


def test_some_positions_are_written():
    """The tensor's channels and those of what is written are one."""

    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        y[:, 1:3] = m.c(x[:, 1:3])
        return m.b(y)

    net = Net(forward, a=nn.Linear(5, 6), c=nn.Linear(5, 6), b=nn.Linear(6, 3))
    check(net, TOKENS, {**PLAIN, "c": range(6)})


def test_some_positions_are_added_to():
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        y[:, ::2] += m.c(x[:, ::2])
        y[:, 0].mul_(m.gain)
        return m.b(y)

    net = Net(forward, a=nn.Linear(5, 6), c=nn.Linear(5, 6), b=nn.Linear(6, 3), gain=nn.Parameter(torch.rand(6)))
    check(net, TOKENS, {**PLAIN, "c": range(6), "gain[0]": range(6)})


def test_a_buffer_of_zeros_is_filled_by_positions():
    def forward(m: Net, x: Tensor) -> Tensor:
        first, second = m.a(x), m.c(x)
        y = x.new_zeros(len(x), 2, first.shape[-1])
        y[:, 0], y[:, 1] = first, second
        return m.b(y)

    net = Net(forward, a=nn.Linear(5, 6), c=nn.Linear(5, 6), b=nn.Linear(6, 3))
    check(net, X, {**PLAIN, "c": range(6)})


def test_a_buffer_of_zeros_is_filled_by_channels():
    """A concatenation written by hand: the tensor is as wide as both together."""

    def forward(m: Net, x: Tensor) -> Tensor:
        first, second = m.a(x), m.c(x)
        y = x.new_empty(len(x), first.shape[1] + second.shape[1])
        y[:, : first.shape[1]] = first
        y[:, first.shape[1] :] = second
        return m.b(y)

    net = Net(forward, a=nn.Linear(5, 6), c=nn.Linear(5, 4), b=nn.Linear(10, 3))
    check(net, X, {"a": range(6), "b.weight[1]": range(6)}, {"c": range(4), "b.weight[1]": range(6, 10)})


def test_views_of_views():
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        y.transpose(1, 2)[:, :, 1:][..., 0].add_(m.c(x[:, 0]))
        return m.b(y)

    net = Net(forward, a=nn.Linear(5, 6), c=nn.Linear(5, 6), b=nn.Linear(6, 3))
    check(net, TOKENS, {**PLAIN, "c": range(6)})


def test_a_view_that_is_read_after_its_base_was_written():
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        view = y[:, 1:]
        y += m.c(x)
        return m.b(view)

    net = Net(forward, a=nn.Linear(5, 6), c=nn.Linear(5, 6), b=nn.Linear(6, 3))
    check(net, TOKENS, {**PLAIN, "c": range(6)})


def test_some_channels_are_written():
    """FasterNet's partial convolution: some channels are replaced by what a layer makes of them."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.a(x).clone()
        x[:, : m.part] = m.partial(x[:, : m.part])
        return pooled(m.b(x))

    net = Net(forward, a=conv(3, 7), partial=conv(3, 3), b=conv(7, 2), part=3)
    check(
        net,
        image(),
        {"a": range(3), "partial": range(3), "partial.weight[1]": range(3), "b.weight[1]": range(3)},
        {"a": range(3, 7), "b.weight[1]": range(3, 7)},
    )


def test_halves_are_written_in_turn():
    """A coupling layer of a flow: each half is changed by what a layer makes of the other."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.a(x)
        left, right = x.chunk(2, 1)
        left += m.left(right)
        right *= m.right(left).exp()
        return m.b(x)

    net = Net(forward, a=nn.Linear(5, 8), left=nn.Linear(4, 4), right=nn.Linear(4, 4), b=nn.Linear(8, 3))
    halves = [(i, i + 4) for i in range(4)]
    check(
        net,
        X,
        {
            "a": halves,
            "left": range(4),
            "left.weight[1]": range(4),
            "right": range(4),
            "right.weight[1]": range(4),
            "b.weight[1]": halves,
        },
    )


def test_a_copy_between_tensors_of_one_width():
    def forward(m: Net, x: Tensor) -> Tensor:
        y = torch.empty_like(m.a(x))
        y.copy_(m.c(x))
        return m.b(y + m.a(x))

    net = Net(forward, a=nn.Linear(5, 6), c=nn.Linear(5, 6), b=nn.Linear(6, 3))
    check(net, X, {**PLAIN, "c": range(6)})


def test_where_entries_are_masked_out():
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        y[x[..., 0] > 0] = 0
        y[y < -1] = -1
        return m.b(y)

    check(Net(forward, a=nn.Linear(5, 6), b=nn.Linear(6, 3)), TOKENS, PLAIN)


def test_channels_of_a_written_number_that_are_overwritten_are_refused():
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        y[:, :2] = 0
        return m.b(y)

    check(Net(forward, a=nn.Linear(5, 6), b=nn.Linear(6, 3)), X, refused={"a": ""})


def test_a_running_average_kept_in_a_buffer():
    """Written in training mode alone; the buffer is as it was afterwards."""

    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        if m.training:
            m.centre.mul_(0.9).add_(y.mean(0), alpha=0.1)
        return m.b(y - m.centre)

    net = Net(forward, a=nn.Linear(5, 6), b=nn.Linear(6, 3))
    net.register_buffer("centre", torch.randn(6))
    before = net.centre.clone()
    check(net, X, {**PLAIN, "centre[0]": range(6)})
    assert torch.equal(net.centre, before)
