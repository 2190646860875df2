"""The hooks: when they act, that they disturb nothing, that they go; errors; saving."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flatprune.flatness.spectrum import Flatness
from kfac_ext import Curvature
from tests.curvature import curvature_nets


def hooks_of(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    kinds += ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")
    return [hook for module in model.modules() for kind in kinds for hook in getattr(module, kind)]


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.3),
        nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def train(model, steps, penalty=None, optimizer=None):
    """Outputs and gradients of some steps of training; data from a generator of its own, dropout from torch's."""
    data = torch.Generator().manual_seed(7)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    seen = []
    for _ in range(steps):
        x, y = torch.randn(8, 2, 7, 7, generator=data), torch.randint(0, 3, (8,), generator=data)
        optimizer.zero_grad()
        output = model(x)
        loss = F.cross_entropy(output, y)
        (loss if penalty is None else loss + penalty(x, output, loss)).backward()
        seen += [output.detach().clone(), *(p.grad.clone() for p in model.parameters())]
        optimizer.step()
    return seen + [buffer.clone() for buffer in model.buffers()] + [torch.get_rng_state()]


@pytest.mark.parametrize("fisher_type", ["true", "empirical"])
def test_training_is_bit_identical_with_and_without(fisher_type):
    plain = net()
    torch.manual_seed(1)
    expected = train(plain, 5)
    watched = net()
    torch.manual_seed(1)
    curvature = Curvature(watched, fisher_type=fisher_type, factor_update_steps=2)
    flatness = Flatness(curvature, start=0, every=2)  # makes all the extra forwards; times 0 it must change nothing
    found = train(watched, 5, penalty=lambda *args: 0 * flatness.penalty(*args))
    assert curvature.is_updated
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("mode", ["forward", "double_backward"])
def test_penalty_leaves_statistics_and_random_stream(mode):
    # weights differ, so compare one step only: buffers after the forward and the generator
    plain, watched = net(), net()
    torch.manual_seed(1)
    plain(torch.ones(8, 2, 7, 7).cumsum(2))
    buffers, rng = list(plain.buffers()), torch.get_rng_state()
    flatness = Flatness(Curvature(watched), start=0, mode=mode)
    torch.manual_seed(1)
    x = torch.ones(8, 2, 7, 7).cumsum(2)
    output = watched(x)
    loss = F.cross_entropy(output, torch.zeros(8, dtype=torch.long))
    assert float(flatness.penalty(x, output, loss).detach()) > 0
    assert float(flatness.penalty(x, output.clone(), loss).detach()) == 0  # step 1 of 4
    assert all(torch.equal(a, b) for a, b in zip(buffers, watched.buffers(), strict=True))
    assert torch.equal(torch.get_rng_state(), rng)


def test_acts_only_in_training_with_gradients():
    model, x = curvature_nets.make("mlp")
    curvature = Curvature(model)
    with torch.no_grad():
        model(x)
    model.eval()
    model(x)
    with curvature.paused():
        model.train()
        model(x)
    assert curvature.step_count == 0 and not curvature.is_updated and curvature.recent_calls == ()
    with pytest.raises(RuntimeError, match="no factors yet"):
        curvature.spectral_radii()
    with pytest.raises(RuntimeError, match="trace"):
        _ = curvature.layers


def test_nothing_is_left_after_remove():
    model, x = curvature_nets.make("conv_norm_depthwise")
    with Curvature(model) as curvature:
        model(x)
        assert len(hooks_of(model)) == 2  # the pre-hook and its kwargs flag
        assert curvature.is_updated
    assert hooks_of(model) == []
    model(x)
    assert curvature.step_count == 1
    curvature.remove()
    with pytest.raises(RuntimeError), Curvature(model):
        model(torch.randn(5, 9, 6, 5, dtype=torch.float64))
    assert hooks_of(model) == []


def test_a_forward_that_fails_leaves_no_hooks_and_no_update():
    model, x = curvature_nets.make("mlp")
    curvature = Curvature(model, factor_update_steps=1)
    model(x)
    before = curvature.factors.buffer.clone()
    with pytest.raises(RuntimeError):
        model(torch.randn(5, 9, dtype=torch.float64))
    assert torch.equal(curvature.factors.buffer, before) and len(hooks_of(model)) == 2
    model(x)
    assert not torch.equal(curvature.factors.buffer, before)


def test_copies_of_the_model_are_not_watched():
    model, x = curvature_nets.make("mlp")
    curvature = Curvature(model)
    twin = copy.deepcopy(model)
    twin(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    torch.load(file, weights_only=False)(x)
    assert curvature.step_count == 0


def test_unused_and_unsupported_layers_are_named_once():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare, self.mix = nn.Linear(3, 4), nn.Linear(4, 4), nn.Bilinear(4, 4, 2)

        def forward(self, x):
            x = self.used(x)
            return self.mix(x, x)

    model = Net()
    curvature = Curvature(model, factor_update_steps=1)
    with pytest.warns(UserWarning) as caught:
        model(torch.randn(5, 3))
    messages = [str(w.message) for w in caught]
    assert len(messages) == 2 and "never calls 'spare'" in messages[0]
    assert "no factors for 'mix' (Bilinear: bilinear takes its weight)" in messages[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(5, 3))
    assert list(curvature.layers) == ["used"]


def test_a_transposed_convolution_that_changes_shape_is_refused():
    class Up(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(2, 3, 3, stride=2)

        def forward(self, x):
            return self.up(x, output_size=(8, 8))

    model = Up()
    Curvature(model)
    with pytest.raises(ValueError, match=r"layer 'up' is called with output_size"):
        model(torch.randn(2, 2, 3, 3))


def test_skip_layers_are_regular_expressions():
    model, x = curvature_nets.make("mlp")
    curvature = Curvature(model, skip_layers=["^4$"])
    model(x)
    assert list(curvature.layers) == ["0", "2"]
    with pytest.raises(ValueError, match="skip_layers"):
        Curvature(model, skip_layers=["."]).trace(x)


def test_frozen_layers_are_named_and_left_out():
    model, x = curvature_nets.make("mlp")
    model[0].requires_grad_(False)
    curvature = Curvature(model)
    with pytest.warns(UserWarning, match="no gradient reaches '0'"):
        model(x)
    assert list(curvature.spectral_radii()) == ["2", "4"]


def test_compiled_models_are_refused():
    model, _ = curvature_nets.make("mlp")
    with pytest.raises(ValueError, match="compile"):
        Curvature(torch.compile(model, backend="eager"))
    with pytest.raises(ValueError, match=r"1 is compiled"):
        Curvature(nn.Sequential(nn.Linear(4, 4), torch.compile(nn.Linear(4, 3))))
    inplace = copy.deepcopy(model)
    inplace.compile(backend="eager")
    with pytest.raises(ValueError, match="compile"):
        Curvature(inplace)


@pytest.mark.filterwarnings("ignore")
def test_a_model_compiled_afterwards_still_delivers():
    torch.compiler.reset()
    found = []
    for compiled in (False, True):
        model, x = curvature_nets.make("mlp")
        curvature = Curvature(model, factor_update_steps=1, generator=torch.Generator().manual_seed(0))
        run = torch.compile(model, backend="eager") if compiled else model
        for step in range(2):
            run(x + step).sum().backward()
        assert curvature.step_count == 2
        found.append(curvature.factors.buffer)
    torch.testing.assert_close(found[0], found[1])


def test_bad_arguments_name_the_argument():
    model, x = curvature_nets.make("mlp")
    for option in (
        {"factor_decay": 1.0},
        {"factor_update_steps": 0},
        {"fisher_type": "exact"},
        {"kfac_approx": "both"},
        {"loss": "hinge"},
    ):
        with pytest.raises(ValueError, match=next(iter(option))):
            Curvature(model, **option)
    assert hooks_of(model) == []
    with pytest.raises(TypeError, match="model is int"):
        Curvature(3)
    with pytest.raises(ValueError, match="lazy"):
        Curvature(nn.Sequential(nn.LazyLinear(3)))
    one_class = nn.Linear(4, 1).double()
    Curvature(one_class)
    with pytest.raises(ValueError, match="classes"):
        one_class(x)


def test_shapes_changed_behind_its_back_are_an_error():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    curvature = Curvature(model, factor_update_steps=1)
    model(torch.randn(5, 3))
    before = curvature.factors.buffer.clone()
    model[0], model[2] = model[0], model[2]
    model[0].weight.data, model[0].bias.data = model[0].weight.data[:3], model[0].bias.data[:3]
    model[2].weight.data = model[2].weight.data[:, :3]
    with pytest.raises(RuntimeError, match=r"0\.G.*narrow"):
        model(torch.randn(5, 3))
    assert torch.equal(curvature.factors.buffer, before)


def test_narrow_keeps_radii_consistent():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    curvature = Curvature(model, factor_update_steps=1)
    x = torch.randn(16, 3, dtype=torch.float64)
    for _ in range(10):
        model(x)
    keep = torch.tensor([0, 2, 5])
    A, G = curvature.factors["2.A"].clone(), curvature.factors["0.G"].clone()
    rows = torch.tensor([0, 2, 5, 6])
    curvature.narrow({"0.G": keep, "2.A": rows})
    assert torch.equal(curvature.factors["2.A"], A[rows][:, rows])
    expected = torch.linalg.eigvalsh(G[keep][:, keep])[-1] * torch.linalg.eigvalsh(curvature.factors["0.A"])[-1]
    torch.testing.assert_close(curvature.spectral_radii()["0"], expected, rtol=1e-3, atol=0)
    with pytest.raises(KeyError):
        curvature.narrow({"none": keep})


def test_state_continues_bit_for_bit():
    model = net()
    curvature = Curvature(model, factor_update_steps=2)
    flatness = Flatness(curvature, total_steps=20, every=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, 5, flatness.penalty, optimizer)
    file = io.BytesIO()
    state = {
        "curvature": curvature.state_dict(),
        "flatness": flatness.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(state, file)
    twin = copy.deepcopy(model)
    torch.manual_seed(5)
    expected = train(model, 5, flatness.penalty, optimizer)

    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = Curvature(twin, factor_update_steps=2, generator=torch.Generator().manual_seed(99))
    resumed = Flatness(other, total_steps=20, every=2)
    other.load_state_dict(state["curvature"])
    resumed.load_state_dict(state["flatness"])
    again = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    again.load_state_dict(state["optimizer"])
    torch.manual_seed(5)
    found = train(twin, 5, resumed.penalty, again)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert torch.equal(curvature.factors.buffer, other.factors.buffer)
    assert torch.equal(curvature.factors.vectors, other.factors.vectors)
    assert torch.equal(curvature.generator.get_state(), other.generator.get_state())


def test_state_of_another_shape_changes_nothing():
    model, x = curvature_nets.make("mlp")
    curvature = Curvature(model)
    model(x)
    state = curvature.state_dict()
    other = Curvature(nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 3)))
    generator = other.generator.get_state()
    with pytest.raises(ValueError, match=r"0\.G|2\.A"):
        other.load_state_dict(state)
    assert other.step_count == 0 and torch.equal(other.generator.get_state(), generator)
    with pytest.raises(ValueError, match="no module named"):
        Curvature(nn.Sequential(nn.Linear(4, 6))).load_state_dict(state)


def test_what_cannot_be_watched_is_refused():
    with pytest.raises(ValueError, match="model ReLU has no parameters"):
        Curvature(nn.ReLU())
    with pytest.raises(TypeError, match=r"skip_layers is 'head', expected a list"):
        Curvature(nn.Linear(2, 2), skip_layers="head")
    with pytest.raises(ValueError, match=r"model is a DataParallel, .* model\.module"):
        Curvature(nn.DataParallel(nn.Linear(2, 2)))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_model_is_refused():
    with pytest.raises(ValueError, match=r"model is scripted by torch.jit"):
        Curvature(torch.jit.script(nn.Linear(2, 2)))


@pytest.mark.parametrize("options", [{"skip_layers": ["("]}, {"layer_batch_dims": {"(": 1}}])
def test_what_is_no_regular_expression_is_refused(options):
    with pytest.raises(ValueError, match=rf"Curvature: {next(iter(options))}: '\(' is no regular expression"):
        Curvature(nn.Linear(2, 2), **options)


@pytest.mark.parametrize("dim", ["first", 1.5, True])
def test_what_is_no_dimension_is_refused(dim):
    with pytest.raises(TypeError, match=r"layer_batch_dims\['head'\] is .*, expected a whole number"):
        Curvature(nn.Linear(2, 2), layer_batch_dims={"head": dim})


def test_patterns_of_no_layer_are_named():
    model, x = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), torch.randn(2, 2)
    with pytest.raises(ValueError, match="layer_batch_dims: 'head' matches none of '0', '1'"):
        Curvature(model, layer_batch_dims={"head": 1}).trace(x)
    with pytest.warns(UserWarning, match="skip_layers: 'head' matches no layer"):
        Curvature(model, skip_layers=["^0", "head"]).trace(x)


@pytest.mark.parametrize("fisher", ["true", "empirical"])
@pytest.mark.parametrize("at", [0, 2])
def test_a_batch_without_samples_counts_for_nothing(fisher, at):
    found = []
    for empty in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
        curvature = Curvature(model, factor_update_steps=1, fisher_type=fisher)
        flatness = Flatness(curvature, start=0, every=1)
        x = torch.randn(4, 5, 1, 4, 4)
        for step, batch in enumerate(x):
            for part in (batch[:0], batch) if empty and step == at else (batch,):
                output = model(part)
                loss = F.cross_entropy(output, torch.zeros(len(part), dtype=torch.int64))
                (loss + flatness.penalty(part, output, loss)).backward()
        curvature.finish_update()
        found.append(curvature.factors.buffer.clone())
    assert torch.equal(*found)
    assert float(flatness._weight()) > 0
