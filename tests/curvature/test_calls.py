"""Calls as people make them are kept whole and made again: keywords, containers, lengths that differ, bounds."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_ext import Curvature
from kfac_ext.curvature import recent
from kfac_ext.curvature.probing import fresh_look, fresh_predictions
from kfac_ext.curvature.recent import Call, RecentCalls


class Net(nn.Module):
    """Takes nested arguments, numbers and texts."""

    def __init__(self):
        super().__init__()
        self.words, self.a, self.head = nn.Embedding(20, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, batch, scale=1.0, *, kind="mean", mask=None):
        x = self.words(batch["tokens"][0]) * scale
        if mask is not None:
            x = x * mask[..., None]
        x = torch.tanh(self.a(x))
        return self.head(x.mean(1) if kind == "mean" else x.sum(1))


def batch(n, length):
    return {"tokens": [torch.randint(0, 20, (n, length))]}


def test_whole_calls_are_made_again_as_they_were():
    torch.manual_seed(0)
    model = Net().double()
    curvature = Curvature(model, factor_update_steps=1)
    outputs = []
    for length in (3, 5, 4):
        mask = torch.ones(6, length)
        outputs.append(model(batch(6, length), 0.5, kind="sum", mask=mask).detach())
    model.eval()
    for found, expected in zip(fresh_predictions(curvature, curvature.recent_calls), outputs):
        assert torch.equal(found, expected)
    calls = curvature.recent_calls
    assert [call.samples for call in calls] == [6, 6, 6]
    assert calls[1].args[1] == 0.5 and calls[1].kwargs["kind"] == "sum"
    A = fresh_look(curvature, ["a"], calls)[0]["a"]
    rows = torch.cat([model.words(call.args[0]["tokens"][0]).flatten(0, 1) * 0.5 for call in calls]).detach()
    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
    torch.testing.assert_close(A, rows.T @ rows / len(rows))  # over all tokens, however long their texts are


def test_replays_may_write_to_their_inputs():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            return self.head(x.mul_(2))

    model, x = InPlace(), torch.randn(4, 3)
    curvature = Curvature(model)
    model(x)
    first, second = (fresh_predictions(curvature, curvature.recent_calls)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_no_more_is_kept_than_is_said(monkeypatch):
    calls = RecentCalls()
    for _ in range(9):
        calls.add(Call.of((torch.zeros(100, 4),), {}))
    assert [call.samples for call in calls.calls()] == [100, 100, 100]
    calls = RecentCalls()
    for _ in range(100):
        calls.add(Call.of((torch.zeros(1, 4),), {}))
    assert len(calls.calls()) == recent.CALLS
    monkeypatch.setattr(recent, "BYTES", 1000)
    calls = RecentCalls()
    for length in (50, 50, 150, 400):
        calls.add(Call.of((torch.zeros(1, length),), {}))
        assert sum(t.nbytes for call in calls.calls() for t in call.tensors()) <= max(1000, 4 * length)
    assert [call.args[0].shape[1] for call in calls.calls()] == [400]  # the newest is kept however large it is


def test_calls_without_a_batch_dimension():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x, edges):
            source, target = edges
            x = torch.tanh(self.a(x))
            return self.head(torch.zeros_like(x).index_add(0, target, x[source]))

    model, x, edges = Graph(), torch.randn(30, 4), torch.randint(0, 30, (2, 70))
    curvature = Curvature(model, factor_update_steps=1)
    for _ in range(3):
        model(x, edges)
    assert all(p.shape == (30, 3) for p in fresh_predictions(curvature, curvature.recent_calls))


def test_calls_are_saved_if_they_can_be():
    model = Net()
    curvature = Curvature(model)
    model(batch(4, 3), kind="sum")
    model(batch(4, 3), torch.nn.Parameter(torch.ones(())))
    model({"tokens": (torch.randint(0, 20, (4, 3)), object())})
    file = io.BytesIO()
    torch.save(curvature.state_dict(), file)
    file.seek(0)
    other = Curvature(Net())
    other.load_state_dict(torch.load(file, weights_only=True))
    kept = other.recent_calls
    assert [call.samples for call in kept] == [4, 4]  # a call with an object of its own cannot be
    assert kept[0].kwargs == {"kind": "sum"}
    assert torch.equal(kept[0].args[0]["tokens"][0], curvature.recent_calls[0].args[0]["tokens"][0])


class OnlyTraining(nn.Module):
    """Evaluation decodes; an extra head is called in training alone."""

    def __init__(self, decoded=lambda out: out.argmax(1)):
        super().__init__()
        self.a, self.extra, self.head, self.decoded = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3), decoded
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = torch.tanh(self.a(x))
        out = self.head(self.drop(self.extra(x) if self.training else x))
        return out if self.training else self.decoded(out)


@pytest.mark.parametrize("decoded", [lambda out: out.argmax(1), lambda out: {"boxes": out, "scores": out * 2}])
def test_outputs_that_only_training_has_are_read_there(decoded):
    model = OnlyTraining(decoded)
    curvature = Curvature(model)
    model(torch.randn(8, 4))
    first, again = (fresh_predictions(curvature, curvature.recent_calls)[0] for _ in range(2))
    assert torch.equal(first, again) and first.shape == (8, 3)  # no dropout
    assert model.training and model.drop.training
    assert fresh_look(curvature, ["extra", "a"], curvature.recent_calls)[0]["extra"].shape == (7, 7)


def test_each_call_is_made_again_once():
    """Also the first time, when it is not known yet whether evaluation mode can be read."""
    model = Net()
    curvature = Curvature(model)
    for _ in range(3):
        model(batch(4, 3))
    calls, times = curvature.recent_calls, []
    model.register_forward_pre_hook(lambda *_: times.append(model.training))
    A, predictions = fresh_look(curvature, ["a", "head"], calls)
    assert times == [False] * 3 and len(predictions) == 3 and list(A) == ["a", "head"]
    fresh_predictions(curvature, calls)
    assert times == [False] * 6


@pytest.mark.parametrize(("samples", "made"), [(None, 4), (1, 2), (6, 2), (13, 3), (99, 4)])
def test_no_older_calls_than_it_takes_are_made_again(samples, made):
    """The newest first, until there are so many samples and every A has the rows for full rank: that of `a` has 7."""
    torch.manual_seed(0)
    model = Net().double()
    curvature = Curvature(model, factor_update_steps=1)
    for _ in range(4):
        model(batch(6, 1))
    calls = curvature.recent_calls
    A, predictions = fresh_look(curvature, ["a", "head"], calls, samples=samples)
    again = fresh_look(curvature, ["a"], calls[4 - made :])
    assert len(predictions) == made and all(map(torch.equal, predictions, again[1]))
    torch.testing.assert_close(A["a"], again[0]["a"], rtol=1e-12, atol=0)
    first = made if samples is None else min(4, -(-samples // 6))  # that of `head` has 6, as many as a call
    newest = fresh_look(curvature, ["head"], calls[4 - first :])[0]
    torch.testing.assert_close(A["head"], newest["head"], rtol=1e-12, atol=0)


def test_no_calls_are_an_error():
    curvature = Curvature(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="no training forward yet"):
        fresh_predictions(curvature, curvature.recent_calls)


class Placed(nn.Module):
    """One layer sees the samples, and positions that belong to none of them."""

    def __init__(self):
        super().__init__()
        self.places, self.shared, self.head = nn.Parameter(torch.randn(1, 6, 4)), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head((self.shared(x) @ self.shared(self.places).mT).relu() @ self.shared(self.places)).mean(1)


def test_positions_beside_samples_are_kept_apart():
    torch.manual_seed(0)
    model, x, y = Placed().double(), torch.randn(7, 6, 4).double(), torch.randint(0, 3, (7,))
    found = []
    for mode in ("reduce", "expand"):
        curvature = Curvature(model, kfac_approx=mode, fisher_type="empirical")
        F.cross_entropy(model(x), y).backward()
        found.append([curvature.factors[f"shared.{factor}"].clone() for factor in "AG"])
        curvature.remove()
    for reduced, expanded in zip(*found):
        torch.testing.assert_close(reduced, expanded)
