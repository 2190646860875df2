"""Recurrent layers: a unit owns its rows in each gate, its column in the recurrence, and what reads it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.coupling.tiny_networks import Net, check, rows

TOKENS = torch.randn(2, 4, 5)
UNITS = 6


def network(memory: nn.Module, width: int = UNITS) -> Net:
    """A Linear, a recurrent layer, a Linear on its last step."""
    return Net(lambda m, x: m.b(m.memory(m.a(x))[0][:, -1]), a=nn.Linear(5, 4), memory=memory, b=nn.Linear(width, 3))


def gates(count: int, suffix: str = "l0", name: str = "memory", biases: bool = True) -> dict[str, object]:
    own = rows(UNITS, UNITS, count)
    found = {f"{name}.weight_ih_{suffix}[0]": own, f"{name}.weight_hh_{suffix}[0]": own}
    found[f"{name}.weight_hh_{suffix}[1]"] = range(UNITS)
    if biases:
        found |= {f"{name}.bias_ih_{suffix}[0]": own, f"{name}.bias_hh_{suffix}[0]": own}
    return found


INPUTS = {"a": range(4), "memory.weight_ih_l0[1]": range(4)}


@pytest.mark.parametrize(("kind", "count"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_units(kind, count):
    check(network(kind(4, UNITS, batch_first=True)), TOKENS, INPUTS, {**gates(count), "b.weight[1]": range(UNITS)})


@pytest.mark.parametrize(("kind", "count"), [(nn.LSTM, 4), (nn.GRU, 3)])
def test_layers_in_a_stack(kind, count):
    """`hidden_size` is one integer for both layers: a unit of each goes."""
    both = {**gates(count), **gates(count, "l1"), "memory.weight_ih_l1[1]": range(UNITS), "b.weight[1]": range(UNITS)}
    check(network(kind(4, UNITS, num_layers=2, batch_first=True)), TOKENS, INPUTS, both)


def test_both_directions():
    net = network(nn.LSTM(4, UNITS, batch_first=True, bidirectional=True), 2 * UNITS)
    both = {**gates(4), **gates(4, "l0_reverse"), "b.weight[1]": rows(UNITS, UNITS)}
    check(net, TOKENS, {**INPUTS, "memory.weight_ih_l0_reverse[1]": range(4)}, both)


@pytest.mark.parametrize(("kind", "count"), [(nn.LSTMCell, 4), (nn.GRUCell, 3), (nn.RNNCell, 1)])
def test_cells(kind, count):
    def forward(m: Net, x: Tensor) -> Tensor:
        state = None
        for step in m.a(x).unbind(1):
            state = m.memory(step, state)
        return m.b(state[0] if isinstance(state, tuple) else state)

    own = rows(UNITS, UNITS, count)
    net = Net(forward, a=nn.Linear(5, 4), memory=kind(4, UNITS), b=nn.Linear(UNITS, 3))
    check(
        net,
        TOKENS,
        {"a": range(4), "memory.weight_ih[1]": range(4)},
        {
            **{f"memory.{name}[0]": own for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")},
            "memory.weight_hh[1]": range(UNITS),
            "b.weight[1]": range(UNITS),
        },
    )


def test_a_recurrence_written_by_hand():
    """One layer over the joined input and state, gates by `chunk`."""

    def forward(m: Net, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), m.units)
        for step in m.a(x).unbind(1):
            update, new = m.step(torch.cat([step, state], 1)).chunk(2, 1)
            state = state + update.sigmoid() * (new.tanh() - state)
        return m.b(state)

    net = Net(forward, a=nn.Linear(5, 4), step=nn.Linear(10, 12), b=nn.Linear(UNITS, 3), units=UNITS)
    check(
        net,
        TOKENS,
        {"a": range(4), "step.weight[1]": range(4)},
        {"step": rows(UNITS, UNITS), "step.weight[1]": range(4, 10), "b.weight[1]": range(UNITS)},
    )


def test_words_through_a_memory_with_a_tied_head():
    """The width of the embedding is the number of units: one neuron owns both."""

    def forward(m: Net, x: Tensor) -> Tensor:
        return m.memory(m.words(x))[0] @ m.words.weight.t()

    net = Net(forward, words=nn.Embedding(7, UNITS), memory=nn.GRU(UNITS, UNITS, batch_first=True))
    check(
        net,
        torch.tensor([[1, 4, 2, 0], [3, 3, 5, 1]]),
        {"words.weight[1]": range(UNITS), "memory.weight_ih_l0[1]": range(UNITS), **gates(3)},
    )


def test_sequences_of_several_lengths():
    def forward(m: Net, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(m.a(x), torch.tensor([4, 2]), batch_first=True)
        return m.b(nn.utils.rnn.pad_packed_sequence(m.memory(packed)[0], batch_first=True)[0].mean(1))

    net = Net(forward, a=nn.Linear(5, 4), memory=nn.LSTM(4, UNITS, batch_first=True), b=nn.Linear(UNITS, 3))
    check(net, TOKENS, INPUTS, {**gates(4), "b.weight[1]": range(UNITS)})
