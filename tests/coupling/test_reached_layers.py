"""Layers that one forward does not reach: whatever it does not see may not break."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatprune.coupling import Call, find_coupling
from tests.coupling.oracle import assert_what_is_left_runs
from tests.coupling.tiny_networks import Net, check

X = torch.randn(2, 5)
PLAIN = {"a": range(6), "b.weight[1]": range(6)}


def around(forward: Callable, **parts: object) -> Net:
    """A Linear to 6 entries and one from 6 to 3, with something between or beside them."""
    return Net(forward, a=nn.Linear(5, 6), b=nn.Linear(6, 3), **parts)


# training or evaluation alone


def test_a_decoder_that_regularises_in_training_alone():
    def forward(m: Net, x: Tensor) -> Tensor:
        hidden = F.relu(m.a(x))
        if m.training:
            m.loss = F.mse_loss(m.decoder(hidden), x)
        return m.b(hidden)

    net = around(forward, decoder=nn.Linear(6, 5))
    coupling = check(net, X, {**PLAIN, "decoder.weight[1]": range(6)})
    assert_what_is_left_runs(net, coupling, (X,))
    assert not hasattr(net, "loss")


def test_a_second_head_in_training_alone():
    def forward(m: Net, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        hidden = F.relu(m.a(x))
        return (m.b(hidden), m.aid_out(F.relu(m.aid(hidden)))) if m.training else m.b(hidden)

    net = around(forward, aid=nn.Linear(6, 4), aid_out=nn.Linear(4, 3))
    check(
        net,
        X,
        {**PLAIN, "aid.weight[1]": range(6)},
        {"aid": range(4), "aid_out.weight[1]": range(4)},
        refused={"aid_out": "output of the model"},
    )


def test_features_that_are_an_output_in_training_alone():
    net = around(lambda m, x: (m.b(m.a(x)), m.a(x)) if m.training else m.b(m.a(x)))
    check(net, X, refused={"a": "output of the model"})


def test_a_layer_in_evaluation_alone():
    net = around(lambda m, x: m.b(m.a(x)) if m.training else m.other(m.a(x)), other=nn.Linear(6, 3))
    check(net, X, {**PLAIN, "other.weight[1]": range(6)})


def test_a_mask_token_in_training_alone():
    """Some positions are replaced by a vector that evaluation never reads."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.a(x)
        if m.training:
            x = torch.where(torch.rand(*x.shape[:2], 1) < 0.5, m.token, x)
        return m.b(x)

    net = around(forward, token=nn.Parameter(torch.randn(6)))
    coupling = check(net, torch.randn(2, 4, 5), {**PLAIN, "token[0]": range(6)})
    assert_what_is_left_runs(net, coupling, (torch.randn(2, 4, 5),))


def test_a_layer_that_meets_the_input_in_training_alone():
    net = Net(lambda m, x: m.b(m.a(x) + (x if m.training else 0)), a=nn.Linear(5, 5), b=nn.Linear(5, 3))
    check(net, X, refused={"a": "add"})


# experts


class Experts(nn.Module):
    """A router sends each sample to one of four experts."""

    def __init__(self, route: Callable, hidden: tuple[int, ...] = (4, 4, 4, 4)) -> None:
        super().__init__()
        self.route = route
        self.stem, self.router = nn.Linear(5, 6), nn.Linear(5, len(hidden))
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, n), nn.ReLU(), nn.Linear(n, 3)) for n in hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.route(self, F.relu(self.stem(x)), *self.router(x).softmax(1).max(1))


def by_row(m: Experts, h: Tensor, share: Tensor, choice: Tensor) -> Tensor:
    return torch.stack([m.experts[int(k)](h[n]) * share[n] for n, k in enumerate(choice)])


def by_list(m: Experts, h: Tensor, share: Tensor, choice: Tensor) -> Tensor:
    return torch.stack([m.experts[k](row) for k, row in zip(choice.tolist(), h)]) * share[:, None]


def by_mask(m: Experts, h: Tensor, share: Tensor, choice: Tensor) -> Tensor:
    y = h.new_zeros(len(h), 3)
    for k, expert in enumerate(m.experts):
        rows = (choice == k).nonzero().squeeze(1)
        if len(rows):
            y = y.index_add(0, rows, expert(h[rows]) * share[rows, None])
    return y


def by_any(m: Experts, h: Tensor, share: Tensor, choice: Tensor) -> Tensor:
    y = h.new_zeros(len(h), 3)
    for k, expert in enumerate(m.experts):
        if (choice == k).any():
            y[choice == k] = expert(h[choice == k]) * share[choice == k, None]
    return y


@pytest.mark.parametrize("hidden", [(4, 4, 4, 4), (4, 5, 6, 7)])
@pytest.mark.parametrize("route", [by_row, by_list, by_mask, by_any])
def test_experts_that_the_example_does_not_choose(route, hidden):
    net = Experts(route, hidden)
    coupling = find_coupling(net, X)  # two samples, four experts
    assert_what_is_left_runs(net, coupling, (torch.randn(64, 5),))
    assert "stem" in {*coupling.refused, *(group.name for group in coupling.groups)}
    if "stem" in coupling.refused:
        assert "experts" in coupling.refused["stem"]


@pytest.mark.parametrize("route", [by_row, by_mask])
def test_an_example_that_chooses_all_experts(route):
    own = [{f"experts.{k}.0": range(4), f"experts.{k}.2.weight[1]": range(4)} for k in range(4)]
    stem = {"stem": range(6), **{f"experts.{k}.0.weight[1]": range(6) for k in range(4)}}
    check(Experts(route), torch.randn(64, 5), stem, *own)


# calls


def test_several_calls_together_reach_everything():
    def forward(m: Net, x: Tensor, task: str = "one") -> Tensor:
        return m.heads[task](F.relu(m.a(x)))

    net = Net(forward, a=nn.Linear(5, 6), heads=nn.ModuleDict({"one": nn.Linear(6, 2), "two": nn.Linear(6, 3)}))
    both = {"a": range(6), "heads.one.weight[1]": range(6), "heads.two.weight[1]": range(6)}
    check(net, [Call((X,), {"task": "one"}), Call((X,), {"task": "two"})], both)
    coupling = find_coupling(net, {"x": X, "task": "one"})  # one call: the other head is coupled, or nothing is cut
    assert_what_is_left_runs(net, coupling, (X, "one"), (X, "two"))


def test_calls_of_two_sizes_reach_both_branches():
    net = around(lambda m, x: m.b(m.a(x)) if len(x) < 8 else m.large(m.a(x)), large=nn.Linear(6, 3))
    check(net, [Call((X,)), Call((torch.randn(9, 5),))], {**PLAIN, "large.weight[1]": range(6)})


@pytest.mark.xfail(strict=True, reason="a counter is put back before each run, so every run takes the same way")
def test_a_counter_is_as_it_was():
    """Every second call goes another way; the traces leave no trace."""

    def forward(m: Net, x: Tensor) -> Tensor:
        m.calls += 1
        return (m.b if m.calls % 2 else m.other)(m.a(x))

    net = around(forward, other=nn.Linear(6, 3))
    net.calls = 0
    coupling = find_coupling(net, [Call((X,)), Call((X,))])
    assert net.calls == 0
    assert_what_is_left_runs(net, coupling, (X,))


def test_a_branch_by_a_random_number():
    """A layer that is dropped half of the time in training."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.a(x)
        if not m.training or random.random() < 0.5:
            x = x + m.c(F.relu(x))
        if m.training and float(torch.rand(())) < 0.01:
            x = x + m.rare(x)
        return m.b(x)

    net = around(forward, c=nn.Linear(6, 6), rare=nn.Linear(6, 6))
    coupling = find_coupling(net, X)
    assert_what_is_left_runs(net, coupling, *[(X,)] * 4)
    for group in coupling.groups:
        owners = {member.names[0] for member in group.members}
        assert ("a.weight" in owners) <= ("rare.weight" in owners)


def test_a_branch_by_a_value():
    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.b(h) if float(x.sum()) > -1e9 else m.other(h)

    net = around(forward, other=nn.Linear(6, 3))
    assert_what_is_left_runs(net, find_coupling(net, X), (X,), (X - 1e10,))


def test_a_layer_that_is_never_called_hinders_nothing():
    check(around(lambda m, x: m.b(m.a(x)), unused=nn.Linear(7, 8)), X, PLAIN)


def test_a_mask_that_chooses_another_layer():
    """Masking changes which of two attentions runs: that of the trace has labels that the other one lacks."""

    def forward(m: Net, x: Tensor) -> Tensor:
        hidden = F.relu(m.a(x))
        scores = hidden @ hidden.T if float(hidden.sum()) > m.threshold else (hidden @ m.aid) @ hidden.T
        return m.b(scores @ hidden)

    net = around(forward, aid=nn.Parameter(torch.eye(6)))
    with torch.no_grad():
        net.threshold = 0.9 * float(F.relu(net.a(X)).sum())
    coupling = find_coupling(net, X)
    assert "cannot be masked" not in str(coupling.refusals)
