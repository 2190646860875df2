"""Labels of -100 count nowhere: with either Fisher, in convolutions, in layers before an attention."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_ext import Curvature
from tests.curvature import curvature_oracles

T, C = 4, 3


class Tagger(nn.Module):
    """Labels of tokens: [N, T, C], or [N, C, T]."""

    def __init__(self, mixes=False, classes_second=False):
        super().__init__()
        self.hidden, self.head = nn.Linear(5, 6), nn.Linear(6, C)
        self.mixes, self.classes_second = mixes, classes_second

    def forward(self, x, labels=None):
        x = torch.tanh(self.hidden(x))
        x = x + x.mean(dim=1, keepdim=True) if self.mixes else x
        logits = self.head(x)
        if labels is not None:
            return {"loss": F.cross_entropy(logits.transpose(1, 2), labels), "logits": logits}
        return logits.transpose(1, 2) if self.classes_second else logits


def tagged(n=8, **options):
    """A model, inputs, and labels of the first two tokens of each sample but the fourth."""
    torch.manual_seed(0)
    model, x = Tagger(**options).double(), torch.randn(n, T, 5, dtype=torch.float64)
    y = torch.randint(0, C, (n, T))
    y[:, 2:] = -100
    y[3] = -100
    return model, x, y


def watch(model, **options):
    options = {"factor_update_steps": 1, "generator": torch.Generator().manual_seed(0), **options}
    return Curvature(model, **options)


def second_moment(rows):
    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("mode", ["reduce", "expand"])
@pytest.mark.parametrize("fisher_type", ["true", "empirical"])
@pytest.mark.parametrize("classes_second", [False, True])
def test_padding_does_what_leaving_it_out_does(mode, fisher_type, classes_second):
    model, x, y = tagged(classes_second=classes_second)
    twin, kept = copy.deepcopy(model), [n for n in range(len(x)) if n != 3]
    found = []
    for network, inputs, targets in ((model, x, y), (twin, x[kept, :2], y[kept, :2])):
        curvature = watch(network, kfac_approx=mode, fisher_type=fisher_type)
        output = network(inputs)
        F.cross_entropy(output if classes_second else output.transpose(1, 2), targets).backward()
        found.append(curvature.factors)
    padded, short = found
    keys = list(padded) if fisher_type == "empirical" else ["hidden.A", "head.A"]  # other labels are drawn
    for key in keys:
        torch.testing.assert_close(padded[key], short[key])


@pytest.mark.parametrize("own_loss", [False, True])
def test_labels_are_drawn_for_what_counts_alone(own_loss):
    """From the first update on, whether the user computes the loss or the model that has been given the labels."""
    model, x, y = tagged(6000)
    curvature = watch(model, kfac_approx="expand")
    if own_loss:
        output = model(x, labels=y)
        assert not curvature.is_updated
        output["loss"].backward()
    else:
        F.cross_entropy(model(x).transpose(1, 2), y).backward()
    p = model.head(torch.tanh(model.hidden(x)))[y >= 0].softmax(-1).detach()
    exact = torch.diag(p.mean(0)) - p.T @ p / len(p)
    torch.testing.assert_close(curvature.factors["head.G"], exact, rtol=0.03, atol=5e-3)


def test_once_padding_was_seen_updates_wait_for_the_backward():
    model, x, y = tagged()
    curvature = watch(model, kfac_approx="expand")
    F.cross_entropy(model(x).transpose(1, 2), y).backward()
    first = curvature.factors["hidden.A"].clone()
    y[0, 2] = 1
    output = model(x)
    assert torch.equal(curvature.factors["hidden.A"], first)
    F.cross_entropy(output.transpose(1, 2), y).backward()
    new = second_moment(x[y >= 0])
    torch.testing.assert_close(curvature.factors["hidden.A"], 0.95 * first + 0.05 * new)
    other = watch(copy.deepcopy(model))
    other.load_state_dict(curvature.state_dict())
    assert other.state_dict()["reading"] == curvature.state_dict()["reading"]


def test_tokens_that_others_attend_to_are_no_padding():
    model, x, y = tagged(mixes=True)
    curvature = watch(model, kfac_approx="expand", fisher_type="empirical")
    F.cross_entropy(model(x).transpose(1, 2), y).backward()
    attended = torch.cat([x[:3], x[4:]]).flatten(0, 1)
    torch.testing.assert_close(curvature.factors["hidden.A"], second_moment(attended))
    mixed = torch.tanh(model.hidden(x))
    mixed = (mixed + mixed.mean(1, keepdim=True)).detach()[y >= 0]
    torch.testing.assert_close(curvature.factors["head.A"], second_moment(mixed))


@pytest.mark.parametrize("groups", [1, 2])
def test_pixels_without_a_label(groups):
    torch.manual_seed(0)
    body, head = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 3, padding=1, groups=groups)
    model = nn.Sequential(body, nn.Tanh(), head).double()
    x = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    y = torch.randint(0, 2, (3, 5, 4))
    y[:, :2], y[1] = -100, -100
    curvature = watch(model, kfac_approx="expand", fisher_type="empirical")
    F.cross_entropy(model(x), y).backward()
    rows = curvature_oracles.input_rows(head, model[:2](x).detach())[(y >= 0).flatten(1)]
    for block, part in zip(curvature.factors["2.A"].view(groups, -1, 36 // groups + 1), rows.chunk(groups, dim=1)):
        torch.testing.assert_close(block, second_moment(part))


def test_samples_without_a_label():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()
    x, y = torch.randn(6, 2, 5, dtype=torch.float64), torch.tensor([0, -100, 2, 1, -100, 0])
    twin = copy.deepcopy(model)
    padded, short = watch(model, fisher_type="empirical"), watch(twin, fisher_type="empirical")
    F.cross_entropy(model(x), y).backward()
    F.cross_entropy(twin(x[y >= 0]), y[y >= 0]).backward()
    for key in short.factors:
        torch.testing.assert_close(padded.factors[key], short.factors[key])


class TwoHeads(nn.Module):
    """A label of each token, and two of the sample."""

    def __init__(self):
        super().__init__()
        self.hidden, self.tags, self.about = nn.Linear(5, 6), nn.Linear(6, C), nn.Linear(6, 2)

    def forward(self, x):
        x = torch.tanh(self.hidden(x))
        return {"tags": self.tags(x), "about": self.about(x.mean(dim=1))}


@pytest.mark.parametrize("fisher_type", ["true", "empirical"])
def test_each_of_two_outputs_leaves_out_its_own(fisher_type):
    """Drawn labels cannot: a backward frees what leads to the first output before the second has a gradient."""
    torch.manual_seed(0)
    model, n = TwoHeads().double(), 4000
    x = torch.randn(n, T, 5, dtype=torch.float64)
    y, about = torch.randint(0, C, (n, T)), torch.randint(0, 2, (n,))
    y[: n // 2, 2:], about[n // 4 :] = -100, -100
    options = {"output": ["tags", "about"], "loss": ["cross_entropy"] * 2, "kfac_approx": "expand"}
    curvature = watch(model, fisher_type=fisher_type, **options)
    output = model(x)
    loss = F.cross_entropy(output["tags"].transpose(1, 2), y) + F.cross_entropy(output["about"], about)
    if fisher_type == "true":
        with pytest.warns(UserWarning, match="one of several outputs"):
            loss.backward()
        return
    loss.backward()
    hidden = torch.tanh(model.hidden(x)).detach()
    rows = {"tags": hidden[y >= 0], "about": hidden.mean(dim=1)[about >= 0]}
    for name, of_layer in rows.items():
        torch.testing.assert_close(curvature.factors[f"{name}.A"], second_moment(of_layer))
    reached = (y >= 0) | (about >= 0)[:, None]
    torch.testing.assert_close(curvature.factors["hidden.A"], second_moment(x[reached]))


def test_an_output_that_needs_no_gradient_leads_to_no_layer():
    torch.manual_seed(0)
    model = TwoHeads().double()
    x, y = torch.randn(8, T, 5, dtype=torch.float64), torch.randint(0, C, (8, T))
    y[:, 2:] = -100
    pick = lambda out: (out["tags"], out["about"].detach())  # noqa: E731
    curvature = watch(model, fisher_type="empirical", output=pick, loss=["cross_entropy"] * 2, kfac_approx="expand")
    F.cross_entropy(model(x)["tags"].transpose(1, 2), y).backward()
    curvature.finish_update()
    torch.testing.assert_close(curvature.factors["hidden.A"], second_moment(x[y >= 0]))


def test_a_certain_prediction_is_no_padding():
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False)
    x = torch.eye(4)[[0, 1, 2, 2]] * 1e4
    model.weight.data = torch.eye(3, 4)
    curvature = watch(model, fisher_type="empirical")
    F.cross_entropy(model(x), torch.tensor([0, 1, 2, 0])).backward()  # three gradients are zero
    g = torch.tensor([-1.0, 0.0, 1.0])
    torch.testing.assert_close(curvature.factors[".G"], torch.outer(g, g) / 4)
    torch.testing.assert_close(curvature.factors[".A"], x.T @ x / 4)


@pytest.mark.parametrize("output", ["logits", lambda out: out["logits"].transpose(1, 2)])
def test_a_function_that_turns_the_output_round_hides_nothing(output):
    model, x, y = tagged()
    curvature = watch(model, kfac_approx="expand", fisher_type="empirical", output=output)
    model(x, labels=y)["loss"].backward()
    torch.testing.assert_close(curvature.factors["hidden.A"], second_moment(x[y >= 0]))


@pytest.mark.parametrize("fisher_type", ["true", "empirical"])
@pytest.mark.parametrize("backward", [True, False])
def test_no_graph_is_kept_alive(fisher_type, backward):
    model, x, y = tagged()
    curvature = watch(model, fisher_type=fisher_type)
    graphs = []
    for _ in range(4):
        handle = model.hidden.register_forward_hook(lambda _m, _a, z: graphs.append(weakref.ref(z)))
        output = model(x)
        handle.remove()
        if backward:
            F.cross_entropy(output.transpose(1, 2), y).backward()
        del output
    gc.collect()
    assert sum(graph() is not None for graph in graphs) <= (0 if backward else 1)
    curvature.remove()
    assert not any(graph() is not None for graph in graphs)
