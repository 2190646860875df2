"""A watched model under other tools: they work, or say that `remove` must be called."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from kfac_ext import Curvature

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def watched(**options):
    model = net()
    return model, Curvature(model, factor_update_steps=1, **options)


X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


def test_script_says_what_to_do():
    model, curvature = watched()
    with pytest.raises(AttributeError, match=r"call its remove\(\) first"):
        torch.jit.script(model)
    curvature.remove()
    torch.testing.assert_close(torch.jit.script(model)(X), model(X))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_export_looks_past_it(training, traced, strict):
    model, curvature = watched()
    if traced:
        curvature.trace(X)
    model.train(training)
    program = torch.export.export(model, (X,), strict=strict)
    torch.testing.assert_close(program.module()(X), model(X))
    assert curvature.step_count == int(training)  # the last forward alone


def test_traces_look_past_it():
    model, curvature = watched()
    torch.testing.assert_close(torch.jit.trace(model, X)(X), net()(X))
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(X), net()(X))
    assert curvature.step_count == 0


@pytest.mark.filterwarnings("ignore")
def test_compiling_a_whole_graph_says_what_to_do():
    torch.compiler.reset()
    model, curvature = watched()
    with pytest.raises(
        Exception, match=r"call its remove\(\) first" if hasattr(torch.compiler, "is_exporting") else ""
    ):
        torch.compile(model, backend="eager", fullgraph=True)(X)
    curvature.remove()
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(X), model(X))


def test_attributes_that_a_model_makes_up_are_none():
    class MadeUp(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return name  # has everything

        def forward(self, x):
            return self.layer(x)

    curvature = Curvature(MadeUp())
    curvature.model(torch.randn(8, 3)).sum().backward()
    assert curvature.is_updated


def test_functional_calls_are_forwards():
    model, curvature = watched(generator=torch.Generator().manual_seed(0))
    functional_call(model, {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}, (X,))
    plain, expected = watched(generator=torch.Generator().manual_seed(0))
    plain(X)
    assert torch.equal(curvature.factors.buffer, expected.factors.buffer)


def test_transforms_look_past_it():
    model, curvature = watched()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x):
        return functional_call(model, parameters, (x[None],)).sum()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, X)
    assert gradients["0.weight"].shape == (8, 6, 4)
    assert torch.func.jacrev(model)(X).shape == (8, 3, 8, 4)
    assert curvature.step_count == 0


class Checkpointed(nn.Module):
    """The middle is made again in the backward."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        x = torch.tanh(self.a(x))
        middle = lambda x: torch.tanh(self.b(x))  # noqa: E731
        x = middle(x) if self.use_reentrant is None else checkpoint(middle, x, use_reentrant=self.use_reentrant)
        return self.head(x)


@pytest.mark.parametrize("fisher_type", ["true", "empirical"])
def test_checkpoints_make_no_difference(fisher_type):
    found = []
    for use_reentrant in (None, False):
        torch.manual_seed(0)
        model = Checkpointed(use_reentrant)
        curvature = Curvature(model, fisher_type=fisher_type, generator=torch.Generator().manual_seed(0))
        F.cross_entropy(model(X), torch.zeros(8, dtype=torch.long)).backward()
        found.append((curvature.factors.buffer, curvature.step_count))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1] == 1


def test_a_model_in_a_checkpoint_counts_once():
    model, curvature = watched()
    checkpoint(model, X, use_reentrant=False).sum().backward()
    assert curvature.step_count == 1 and curvature.is_updated


def test_old_checkpoints_are_named():
    model = Checkpointed(True)
    curvature = Curvature(model)
    with pytest.raises(RuntimeError, match=r"use_reentrant=False, take fisher_type='empirical', or call remove"):
        model(X)
    curvature.remove()
    Curvature(model, fisher_type="empirical")
    with pytest.warns(UserWarning, match="no gradient reaches 'b'.*use_reentrant=False"):
        F.cross_entropy(model(X), torch.zeros(8, dtype=torch.long)).backward()
        model(X)


# two forwards before a backward, and large factors


def test_a_backward_of_two_forwards_finishes_the_first():
    model, curvature = watched(fisher_type="empirical", loss="other")
    curvature.factor_update_steps = 2
    one, other = model(X), model(X.flip(1))
    (one * other).mean().backward()
    assert curvature.updated_layers == {"0", "2"}


def test_factors_that_are_too_large_cost_nothing():
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 6), nn.Linear(6, 50_257))
    with pytest.warns(
        UserWarning, match=r"'2' \(Linear: its G \[50257, 50257\] of 10 GB is above max_factor_size=11180"
    ):
        curvature = Curvature(model, factor_update_steps=1)
        model(torch.randint(0, 50, (2, 3)))
    assert list(curvature.layers) == ["1"] and curvature.factors.buffer.numel() < 200
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randint(0, 50, (2, 3)))
        Curvature(net(), max_factor_size=7).trace(X)


def test_the_largest_factor_can_be_set():
    model = net()
    with pytest.warns(UserWarning, match=r"'2' \(Linear: its A \[7, 7\] .* max_factor_size=6"):
        curvature = Curvature(model, max_factor_size=6)
        model(X)
    assert list(curvature.layers) == ["0"]
    with pytest.raises(ValueError, match="max_factor_size is 0"):
        Curvature(model, max_factor_size=0)
    wide = nn.Linear(2, 6000, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"factors take 288 MB, .* times the model.*skip_layers=\['\^\$'\]"):
        Curvature(wide).trace(torch.randn(2, 2, dtype=torch.float64))
