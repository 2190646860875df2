"""Sums and statistics: over positions they change nothing, over channels they mix, or normalise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.coupling.tiny_networks import Net, check, conv, image, pooled, rows

X = torch.randn(2, 5)
PLAIN = {"a": range(6), "b.weight[1]": range(6)}


def between(operation, **parts) -> Net:
    """A Linear to 6 entries, an operation on (module, [N, 6]), a Linear to 3."""
    return Net(lambda m, x: m.b(operation(m, m.a(x))), a=nn.Linear(5, 6), b=nn.Linear(6, 3), **parts)


def over_channels(operation, inputs: int = 1) -> Net:
    """The same, but the second Linear reads `inputs` entries."""
    return Net(lambda m, x: m.b(operation(m.a(x))), a=nn.Linear(5, 6), b=nn.Linear(inputs, 3))


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.mean((2, 3)),
        lambda x: x.sum((2, 3)),
        lambda x: x.amax((2, 3)),
        lambda x: x.flatten(2).max(2).values,
        lambda x: x.flatten(2).std(2),
        lambda x: x.flatten(2).norm(dim=2),
        lambda x: x.flatten(2).logsumexp(2),
        lambda x: x.flatten(2).median(2).values,
        lambda x: torch.var_mean(x, (2, 3))[0],
        lambda x: x.flatten(2).softmax(2)[..., 0],
        lambda x: x.flatten(2).cumsum(2)[..., -1],
        lambda x: x.flatten(2).sort(2).values[..., 3],
        lambda x: x.flatten(2).topk(2, 2).values.mean(2),
        lambda x: x.flatten(2).prod(2),
        lambda x: x.amax(2).argmax(2).float() + x.mean((2, 3)),
        lambda x: (x.clamp(min=1e-6) ** 3).mean((2, 3)) ** (1 / 3),
    ],
    ids=[
        "mean",
        "sum",
        "amax",
        "max",
        "std",
        "norm",
        "logsumexp",
        "median",
        "var_mean",
        "softmax",
        "cumsum",
        "sort",
        "topk",
        "prod",
        "argmax",
        "generalised_mean",
    ],
)
def test_positions_are_summed_up(operation):
    net = Net(lambda m, x: m.b(operation(m.a(x))), a=conv(3, 6), b=nn.Linear(6, 3))
    check(net, image(), PLAIN)


def test_attention_over_positions_pools():
    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.a(x)
        return m.b((x * m.score(x).softmax(1)).sum(1))

    net = Net(forward, a=nn.Linear(5, 6), score=nn.Linear(6, 1), b=nn.Linear(6, 3))
    check(net, torch.randn(2, 4, 5), {**PLAIN, "score.weight[1]": range(6)})


@pytest.mark.parametrize(
    ("operation", "word"),
    [
        (lambda x: x.softmax(1), "softmax"),
        (lambda x: x.log_softmax(-1), "log_softmax"),
        (lambda x: x.cumsum(1), "cumsum"),
        (lambda x: x.sort(1).values, "sort"),
        (lambda x: x - x.cummax(1).values, "cummax"),
        (lambda x: F.max_pool1d(x, 3, 1, 1), "max_pool"),
        (lambda x: F.avg_pool1d(x[:, None], 3, 1, 1)[:, 0], "avg_pool"),
        (lambda x: F.local_response_norm(x[..., None], 3)[..., 0], "avg_pool"),
        (lambda x: F.conv1d(x[:, None], torch.ones(1, 1, 3), padding=1)[:, 0], "conv"),
        (lambda x: torch.fft.rfft(x, dim=1).real.repeat_interleave(2, 1)[:, :6], "fft"),
    ],
)
def test_what_mixes_channels_is_refused_by_name(operation, word):
    net = Net(
        lambda m, x: m.out(m.body(x)),
        body=between(lambda _m, x: operation(x)),
        out=nn.Linear(3, 2),
    )
    coupling = check(
        net,
        X,
        {"body.b": range(3), "out.weight[1]": range(3)},
        refused={"body.a": [word, "in body"]},
    )
    assert "body.a" not in coupling.expected


@pytest.mark.parametrize(
    ("operation", "word"),
    [
        (lambda x: x.mean(1, keepdim=True), "mean"),
        (lambda x: x.amax(1, keepdim=True), "amax"),
        (lambda x: x.std(1, keepdim=True), "std"),
        (lambda x: x.norm(dim=1, keepdim=True), "norm"),
        (lambda x: x.logsumexp(1, keepdim=True), "logsumexp"),
        (lambda x: x.topk(1, 1).values, "topk"),
    ],
)
def test_a_statistic_of_the_channels_that_is_read_is_refused(operation, word):
    check(over_channels(operation), X, refused={"a": word})


def test_a_statistic_that_is_an_output_is_refused():
    net = Net(lambda m, x: (m.b(m.a(x)), m.a(x).mean(1)), a=nn.Linear(5, 6), b=nn.Linear(6, 3))
    check(net, X, refused={"a": "mean"})


def test_a_maximum_of_channels_beside_their_mean_is_refused():
    """CBAM's spatial gate."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.a(x)
        pair = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return pooled(m.b(x * torch.sigmoid(m.gate(pair))))

    coupling = check(Net(forward, a=conv(3, 6), gate=conv(2, 1), b=conv(6, 3)), image())
    assert any(word in coupling.refused["a"] for word in ("mean", "amax"))


# Norms over channels written by hand: x_c times a function of a statistic of all x_c.


@pytest.mark.parametrize(
    "norm",
    [
        lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6),
        lambda x: 3 * x / (x.norm(dim=-1, keepdim=True) + 1e-6),
        lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt(),
        lambda x: F.normalize(x, dim=-1),
        lambda x: x - x.mean(-1, keepdim=True),
        lambda x: x / x.abs().mean(-1, keepdim=True).clamp_min(1e-3),
        lambda x: x / (1e-3 + x.abs().amax(-1, keepdim=True)),
    ],
    ids=["rms", "norm", "layer", "normalize", "centre", "mean", "amax"],
)
def test_norms_by_hand(norm):
    check(between(lambda _m, x: norm(x)), X, PLAIN)
    gained = between(lambda m, x: norm(x) * m.gain, gain=nn.Parameter(torch.rand(6) + 0.5))
    check(gained, X, {**PLAIN, "gain[0]": range(6)})


def test_a_layer_norm_over_dimension_one_by_hand():
    """ConvNeXt's channels-first norm."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.a(x)
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-6)
        return pooled(m.b(m.gain[:, None, None] * x + m.shift[:, None, None]))

    net = Net(
        forward, a=conv(3, 6), b=conv(6, 3), gain=nn.Parameter(torch.rand(6) + 0.5), shift=nn.Parameter(torch.randn(6))
    )
    check(net, image(), {**PLAIN, "gain[0]": range(6), "shift[0]": range(6)})


def test_global_response_norm():
    """ConvNeXtV2: each channel's norm over positions, divided by the mean of those of all channels."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.a(x)
        size = x.norm(dim=(2, 3), keepdim=True)
        return pooled(m.b(m.gain * (x * (size / (size.mean(1, keepdim=True) + 1e-6))) + m.shift + x))

    net = Net(
        forward,
        a=conv(3, 6),
        b=conv(6, 3),
        gain=nn.Parameter(torch.zeros(1, 6, 1, 1)),
        shift=nn.Parameter(torch.zeros(1, 6, 1, 1)),
    )
    check(net, image(), {**PLAIN, "gain[1]": range(6), "shift[1]": range(6)})


def test_a_statistic_of_one_stream_over_another_is_refused():
    """Their channels are not the same: the mean of one scales the other."""
    net = Net(
        lambda m, x: m.b(m.c(x) * m.a(x).mean(1, keepdim=True)),
        a=nn.Linear(5, 6),
        c=nn.Linear(5, 4),
        b=nn.Linear(4, 3),
    )
    check(net, X, {"c": range(4), "b.weight[1]": range(4)}, refused={"a": "mean"})


def test_split_attention_over_branches():
    """ResNeSt: a softmax over two branches of each channel."""

    def forward(m: Net, x: Tensor) -> Tensor:
        branches = m.a(x).unflatten(1, (2, -1))
        weights = m.gate(branches.sum(1).mean((2, 3))).unflatten(1, (2, -1)).softmax(1)
        return pooled(m.b((branches * weights[..., None, None]).sum(1)))

    net = Net(forward, a=conv(3, 8), gate=nn.Linear(4, 8), b=conv(4, 3))
    check(net, image(), {"a": rows(4, 4), "gate": rows(4, 4), "gate.weight[1]": range(4), "b.weight[1]": range(4)})


def test_a_sum_over_channels_reads_them():
    """Dot products of two layers, as a two-tower model has them."""
    net = Net(lambda m, x: m.a(x) @ m.c(x).mT, a=nn.Linear(5, 6), c=nn.Linear(5, 6))
    check(net, torch.randn(4, 5), {"a": range(6), "c": range(6)})


def test_normalised_dot_products():
    net = Net(
        lambda m, x: F.normalize(m.a(x), dim=1) @ F.normalize(m.c(x), dim=1).mT, a=nn.Linear(5, 6), c=nn.Linear(5, 6)
    )
    check(net, torch.randn(4, 5), {"a": range(6), "c": range(6)})


def test_a_product_summed_by_hand_reads_both():
    net = Net(lambda m, x: (m.a(x) * m.b(x)).sum(-1), a=nn.Linear(5, 6), b=nn.Linear(5, 6))
    check(net, torch.randn(2, 5), {"a": range(6), "b": range(6)})
