"""Networks on which other packages that do this job have failed, by what is special about them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatprune.coupling import find_coupling
from tests.coupling.oracle import assert_every_group_is_right, assert_what_is_left_runs
from tests.coupling.tiny_networks import Net, check, conv, image, pooled, rows

X = torch.randn(2, 5)
PLAIN = {"a": range(6), "b.weight[1]": range(6)}


# A forward that checks what it gets


def chain(*checks, **parts) -> Net:
    """Three Linears; `checks` are called with the module and what each of them made."""

    def forward(m: Net, x: Tensor) -> Tensor:
        for layer, test in zip((m.a, m.c), (*checks, None, None)):
            x = F.relu(layer(x))
            if test is not None:
                test(m, x)
        return m.b(x)

    return Net(forward, a=nn.Linear(5, 6), c=nn.Linear(6, 4), b=nn.Linear(4, 3), **parts)


def asserts(_m: Net, x: Tensor) -> None:
    assert x.shape[-1] == 6, "wrong width"


def raises(_m: Net, x: Tensor) -> None:
    if x.shape[-1] != 6:
        raise ValueError(f"wrong width {x.shape[-1]}")


def asserts_by_torch(_m: Net, x: Tensor) -> None:
    torch._assert(x.shape[-1] == 6, "wrong width")


def raises_something_odd(_m: Net, x: Tensor) -> None:
    {6: "wrong width"}[x.shape[-1]]


def divides(_m: Net, x: Tensor) -> None:
    1 / (x.shape[-1] // 6)


@pytest.mark.parametrize("test", [asserts, raises, asserts_by_torch, raises_something_odd, divides])
def test_a_forward_that_checks_a_written_width_is_the_reason(test):
    coupling = check(chain(test), X, {"c": range(4), "b.weight[1]": range(4)})
    wanted = {
        "asserts": "AssertionError: wrong width",
        "raises": "ValueError: wrong width",
        "asserts_by_torch": "AssertionError: wrong width",
        "raises_something_odd": "KeyError",
        "divides": "ZeroDivisionError",
    }
    assert wanted[test.__name__] in coupling.refused["a"]


def test_a_forward_that_checks_a_number_of_the_module():
    """The number follows the width, since nothing else reads it."""

    def test(m: Net, x: Tensor) -> None:
        assert x.shape[-1] == m.width, "wrong width"

    net = chain(test, width=6)
    coupling = check(net, X, {"a": range(6), "c.weight[1]": range(6)}, {"c": range(4), "b.weight[1]": range(4)})
    assert [attribute.key for attribute in coupling.attributes["a"]] == ["width"]
    assert net.width == 6


def test_a_check_in_a_hook():
    net = chain()
    net.c.register_forward_pre_hook(lambda _m, args: asserts(net, args[0]))
    check(net, X, {"c": range(4), "b.weight[1]": range(4)}, refused={"a": "AssertionError: wrong width"})


def test_a_width_that_is_unpacked_and_written_again():
    def forward(m: Net, x: Tensor) -> Tensor:
        n, c = (x := m.a(x)).shape
        return m.b(x.view(n, c // 2, 2).flatten(1).view(-1, 6))

    check(Net(forward, a=nn.Linear(5, 6), b=nn.Linear(6, 3)), X, refused={"a": "view"})


# Subclasses of layers


class LowRank(nn.Linear):
    """LoRA as a Linear with two parameters more."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.randn(4, inputs)), nn.Parameter(torch.zeros(outputs, 4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


class Masked(nn.Linear):
    """A weight times a buffer of its shape."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("mask", torch.rand(outputs, inputs).round())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class Noisy(nn.Linear):
    """A weight and the size of the noise that is added to it in training."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.spread = nn.Parameter(torch.rand(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + self.spread * torch.randn_like(self.weight) if self.training else self.weight
        return F.linear(x, weight, self.bias)


class Scaled(nn.Linear):
    """A gain for each output."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.gain = nn.Parameter(torch.rand(outputs) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.gain[:, None], self.bias)


class Rounded(nn.Linear):
    """Fake quantisation with one scale for all, straight through."""

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight * 64).round() / 64
        return F.linear(x, self.weight + (weight - self.weight).detach(), self.bias)


class Stretched(nn.Linear):
    """An equalised learning rate: a number times the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 0.5, self.bias)


OWN = {
    LowRank: ({"a.up[0]": range(6)}, {"b.down[1]": range(6)}),
    Masked: ({"a.mask[0]": range(6)}, {"b.mask[1]": range(6)}),
    Noisy: ({"a.spread[0]": range(6)}, {"b.spread[1]": range(6)}),
    Scaled: ({"a.gain[0]": range(6)}, {}),
    Rounded: ({}, {}),
    Stretched: ({}, {}),
}


@pytest.mark.parametrize("kind", OWN)
def test_subclasses_of_linear_with_tensors_of_their_own(kind):
    net = nn.Sequential()
    for name, layer in {"a": kind(5, 6), "r": nn.ReLU(), "b": kind(6, 3)}.items():
        net.add_module(name, layer)
    made, read = OWN[kind]
    makes = {"a.weight[0]": range(6), "a.bias[0]": range(6), "b.weight[1]": range(6)}
    rank = [{f"{n}.down[0]": range(4), f"{n}.up[1]": range(4)} for n in "ab"] if kind is LowRank else []
    coupling = check(net, X, {**makes, **made, **read}, *rank)
    assert_what_is_left_runs(net, coupling, (X,))


class Cosine(nn.Linear):
    """Rows of unit length: a norm over what is read."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=1))


def test_a_cosine_classifier_is_cut_by_its_survivors_or_refused():
    net = Net(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Linear(5, 6), b=Cosine(6, 3, bias=False))
    coupling = find_coupling(net, X)
    assert coupling.groups or "norm" in coupling.refused["a"]


class SamePadding(nn.Conv2d):
    """TensorFlow's padding, computed from the size of the image."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride, 0, 1, self.groups)


def test_subclasses_of_convolutions():
    net = Net(
        lambda m, x: pooled(m.b(F.relu(m.deep(m.a(x))))),
        a=SamePadding(3, 6, 2),
        deep=SamePadding(6, 6, 2, groups=6),
        b=SamePadding(6, 3, 2),
    )
    coupling = check(net, image(), {**PLAIN, "deep": range(6)})
    assert_every_group_is_right(net.double(), coupling, image().double())


class GroupNormOfOne(nn.GroupNorm):
    """timm's `GroupNorm1`: another order of arguments."""

    def __init__(self, channels: int) -> None:
        super().__init__(1, channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def test_a_subclass_of_group_norm():
    net = Net(lambda m, x: pooled(m.b(m.norm(m.a(x)))), a=conv(3, 6), norm=GroupNormOfOne(6), b=conv(6, 3))
    coupling = check(net, image(), {**PLAIN, "norm": range(6)})
    assert_every_group_is_right(net.double().eval(), coupling, image().double())


# Halves of one layer


def test_a_gated_convolution_of_sequences():
    net = Net(
        lambda m, x: m.head(F.relu(m.b(F.glu(m.a(x), dim=1))).mean(-1)),
        a=nn.Conv1d(3, 12, 3),
        b=nn.Conv1d(6, 4, 3),
        head=nn.Linear(4, 2),
    )
    coupling = check(
        net,
        torch.randn(2, 3, 9),
        {"a": rows(6, 6), "b.weight[1]": range(6)},
        {"b": range(4), "head.weight[1]": range(4)},
    )
    assert_every_group_is_right(net.double(), coupling, torch.randn(2, 3, 9).double())


def test_a_cross_stage_block():
    """Half of the channels go round the block; both are joined."""

    def forward(m: Net, x: Tensor) -> Tensor:
        left, right = F.silu(m.a(x)).chunk(2, 1)
        for layer in m.inner:
            right = right + F.silu(layer(right))
        return pooled(m.b(torch.cat([left, right], 1)))

    net = Net(forward, a=conv(3, 8), inner=nn.ModuleList([conv(4, 4), conv(4, 4)]), b=conv(8, 3))
    inner = {f"inner.{i}": range(4) for i in range(2)} | {f"inner.{i}.weight[1]": range(4) for i in range(2)}
    coupling = check(net, image(), {"a": rows(4, 4), **inner, "b.weight[1]": rows(4, 4)})
    assert_every_group_is_right(net.double(), coupling, image().double())


def test_layers_side_by_side_that_all_join():
    """ELAN: the outputs of a chain are all joined."""

    def forward(m: Net, x: Tensor) -> Tensor:
        parts = [m.a(x), m.c(x)]
        for layer in m.inner:
            parts.append(F.silu(layer(parts[-1])))
        return pooled(m.b(torch.cat(parts, 1)))

    net = Net(forward, a=conv(3, 4), c=conv(3, 5), inner=nn.ModuleList([conv(5, 4), conv(4, 3)]), b=conv(16, 3))
    coupling = check(
        net,
        image(),
        {"a": range(4), "b.weight[1]": range(4)},
        {"c": range(5), "inner.0.weight[1]": range(5), "b.weight[1]": range(4, 9)},
        {"inner.0": range(4), "inner.1.weight[1]": range(4), "b.weight[1]": range(9, 13)},
        {"inner.1": range(3), "b.weight[1]": range(13, 16)},
    )
    assert_every_group_is_right(net.double(), coupling, image().double())


# A forward that draws random numbers


def test_a_sample_of_a_distribution_in_evaluation_too():
    """A variational autoencoder."""

    def forward(m: Net, x: Tensor) -> Tensor:
        h = F.relu(m.a(x))
        mean, spread = m.mean(h), (0.5 * m.spread(h)).exp()
        return m.out(F.relu(m.b(mean + spread * torch.randn_like(spread))))

    net = Net(
        forward, a=nn.Linear(5, 6), mean=nn.Linear(6, 4), spread=nn.Linear(6, 4), b=nn.Linear(4, 7), out=nn.Linear(7, 5)
    )
    check(
        net,
        X,
        {"a": range(6), "mean.weight[1]": range(6), "spread.weight[1]": range(6)},
        {"mean": range(4), "spread": range(4), "b.weight[1]": range(4)},
        {"b": range(7), "out.weight[1]": range(7)},
    )


def drop_path(x: Tensor, share: float) -> Tensor:
    kept = x.new_empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(1 - share)
    return x * kept.div_(1 - share)


def shake(x: Tensor) -> Tensor:
    return x * torch.rand(len(x), 1) + 0.5 * x


def mixed_samples(x: Tensor) -> Tensor:
    share = float(np.random.beta(1, 1))  # noqa: NPY002 - as the code that is imitated does
    return share * x + (1 - share) * x[torch.randperm(len(x))]


def noise_of_python(x: Tensor) -> Tensor:
    return x * random.uniform(0.5, 1.5)


def monte_carlo(x: Tensor) -> Tensor:
    return torch.stack([F.dropout(x, 0.3) for _ in range(3)]).mean(0)


def channel_dropout(x: Tensor) -> Tensor:
    return F.dropout1d(x[:, :, None], 0.3).squeeze(2)


def gaussian_noise(x: Tensor) -> Tensor:
    return x + torch.empty_like(x).normal_(0, 0.1) * x.detach().abs()


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: drop_path(x, 0.3),
        shake,
        mixed_samples,
        noise_of_python,
        monte_carlo,
        channel_dropout,
        gaussian_noise,
        lambda x: F.dropout(x, 0.3),
        lambda x: torch.where(torch.rand_like(x) > 0.5, x, 0.1 * x),
        lambda x: torch.distributions.Normal(x, 1.0).rsample(),
        lambda x: x * F.gumbel_softmax(torch.zeros(len(x), 2))[:, :1],
    ],
    ids=["path", "shake", "mixed", "python", "monte", "channels", "noise", "dropout", "where", "rsample", "gumbel"],
)
@pytest.mark.parametrize("always", [True, False])
def test_random_forwards(operation, always):
    net = Net(
        lambda m, x: m.b(F.relu(operation(m.a(x)) if always or m.training else m.a(x))),
        a=nn.Linear(5, 6),
        b=nn.Linear(6, 3),
    )
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    check(net, X, PLAIN)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002


def test_a_draw_over_the_channels_is_refused():
    """Gumbel's softmax and a choice of one of the channels mix them, however random."""
    for operation, word in (
        (lambda x: F.gumbel_softmax(x, dim=1), "softmax"),
        (lambda x: x * F.one_hot(torch.multinomial(x.softmax(1), 1)[:, 0], x.shape[1]), ""),
    ):
        net = Net(lambda m, x, f=operation: m.b(f(m.a(x))), a=nn.Linear(5, 6), b=nn.Linear(6, 3))
        check(net, X, refused={"a": word})


# One number over all channels


def test_masks_gates_and_adjacencies():
    def attend(m: Net, x: Tensor) -> Tensor:
        h = F.relu(m.a(x))
        return pooled(m.b(h * torch.sigmoid(m.gate(h))))

    check(
        Net(attend, a=conv(3, 6), gate=nn.Conv2d(6, 1, 1), b=conv(6, 3)),
        image(),
        {**PLAIN, "gate.weight[1]": range(6)},
    )
    padded = Net(
        lambda m, x, mask: m.b((F.relu(m.a(x)) * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)),
        a=nn.Linear(5, 6),
        b=nn.Linear(6, 3),
    )
    check(padded, (torch.randn(2, 4, 5), torch.tensor([[1.0] * 4, [1.0, 1.0, 0.0, 0.0]])), PLAIN)
    graph = Net(lambda m, x, adjacency: m.b(F.relu(adjacency @ m.a(x))), a=nn.Linear(5, 6), b=nn.Linear(6, 3))
    check(graph, (torch.randn(4, 5), torch.rand(4, 4)), PLAIN)


def test_a_mask_as_wide_as_the_batch_or_the_tokens():
    """Sizes that happen to be equal couple nothing: labels do not go by size."""
    net = Net(lambda m, x: m.b(m.a(x) * torch.rand(6, 1)), a=nn.Linear(6, 6), b=nn.Linear(6, 3))
    check(net, torch.randn(6, 6), PLAIN)
    net = Net(lambda m, x: m.b(m.a(x).mT @ m.a(x)).mean(1), a=nn.Linear(6, 6), b=nn.Linear(6, 3))
    assert find_coupling(net, torch.randn(2, 6, 6)) is not None


# A vector over the channels


class Affine(nn.Module):
    """ResMLP's."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.ones(1, 1, channels)), nn.Parameter(torch.zeros(1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.beta, self.alpha, x)


class Slopes(nn.Module):
    """FReLU-like: a slope and a threshold of each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.slope, self.threshold = nn.Parameter(torch.rand(channels)), nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(x * self.slope, self.threshold)


@pytest.mark.parametrize("kind", [Affine, Slopes, nn.RMSNorm])
def test_vectors_over_the_channels(kind):
    net = Net(lambda m, x: m.b(F.relu(m.v(m.a(x)))), a=nn.Linear(5, 6), v=kind(6), b=nn.Linear(6, 3))
    vectors = {f"v.{key}[{t.dim() - 1}]": range(6) for key, t in net.v.named_parameters()}
    coupling = check(net, torch.randn(2, 4, 5), {**PLAIN, **vectors})
    assert_every_group_is_right(net.double(), coupling, torch.randn(2, 4, 5).double())
