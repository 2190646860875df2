"""Disout: where it distorts and by how much, its gradient, and what it leaves alone."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flatprune.flatness.distortion import Disout, attach_disout
from flatprune.flatness.sam import SAM
from flatprune.flatness.spectrum import Flatness
from flatprune.pruning.pruner import Pruner
from flatprune.pruning.targets import Target
from kfac_ext import Curvature
from tests.curvature import curvature_nets


def distorted_places(layer, shape):
    """Where a map of ones changes: there alpha std = 0 puts zeros."""
    return layer(torch.ones(shape)) == 0


def block_union(seeds, size):
    """The places of all blocks with these top left corners, one by one."""
    places = torch.zeros_like(seeds)
    for n, c, y, x in seeds.nonzero().tolist():
        places[n, c, y : y + size, x : x + size] = True
    return places


@pytest.mark.parametrize("shape", [(400, 300), (200, 6, 100)])
def test_single_elements_and_their_number(shape):
    places = distorted_places(Disout(0.2), shape).float()
    deviation = (0.2 * 0.8 / places.numel()) ** 0.5
    assert abs(float(places.mean()) - 0.2) < 5 * deviation
    assert abs(float(places[1:].flatten() @ places[:-1].flatten()) / places[1:].numel() - 0.04) < 5 * deviation


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_blocks_and_their_number(size):
    height, width, probability = 9, 7, 0.15
    places = distorted_places(Disout(probability, block_size=size), (300, 8, height, width))
    # every distorted place lies in a whole block
    corners = F.avg_pool2d(places.float(), size, stride=1) > 1 - 1e-6
    seeds = torch.zeros_like(places)
    seeds[:, :, : height - size + 1, : width - size + 1] = corners
    assert torch.equal(block_union(seeds, size), places)
    # a place is kept where none of the corners that reach it is drawn
    drawn = probability * height * width / (size**2 * (height - size + 1) * (width - size + 1))
    kept = torch.zeros(height, width)
    for y, x in itertools.product(range(height), range(width)):
        reach = [range(max(0, i - size + 1), min(i, n - size) + 1) for i, n in ((y, height), (x, width))]
        kept[y, x] = (1 - drawn) ** (len(reach[0]) * len(reach[1]))
    frequency = places.float().mean(dim=(0, 1))
    assert float((frequency - (1 - kept)).abs().max()) < 5 * (0.25 / 2400) ** 0.5
    assert 0.7 * probability < float(places.float().mean()) <= 1.05 * probability


def test_a_map_smaller_than_the_block_is_distorted_as_a_whole():
    places = distorted_places(Disout(0.3, block_size=6), (500, 4, 3, 3))
    whole = places.flatten(2)
    assert torch.equal(whole.all(dim=2), whole.any(dim=2))
    assert abs(float(whole.any(dim=2).float().mean()) - 0.3) < 5 * (0.21 / 2000) ** 0.5


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
def test_values(alpha):
    torch.manual_seed(3)
    x = 3 + 2 * torch.randn(300, 200, dtype=torch.float64)
    y = Disout(0.25, alpha=alpha)(x)
    ratio = y / x
    scale = ratio.median()  # most places are kept
    kept = (ratio - scale).abs() < 1e-9
    fraction = float(kept.double().mean())
    assert abs(fraction - 0.75) < 0.01
    assert float(scale) == pytest.approx(1 / fraction, rel=1e-6)
    noise = y[~kept] * fraction
    assert float(noise.mean()) == pytest.approx(0, abs=5 * alpha * 2 / len(noise) ** 0.5)
    assert float(noise.std()) == pytest.approx(alpha * float(x.std()), rel=0.03, abs=1e-12)


@pytest.mark.parametrize("shape", [(3, 7), (1, 2, 4, 4)])
def test_gradient_equals_finite_differences(shape):
    torch.manual_seed(1)
    layer = Disout(0.3, block_size=2, alpha=0.7).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(shape, dtype=torch.float64)

    def value(at, spread):
        torch.manual_seed(8)
        with pytest.MonkeyPatch.context() as patch:  # the spread of the noise counts as a constant
            patch.setattr(torch.Tensor, "std", lambda *_, **__: spread)
            return (layer(at) * weights).sum()

    spread = x.detach().std(correction=0)
    (gradient,) = torch.autograd.grad(value(x, spread), x)
    for index in itertools.product(*map(range, shape)):
        step = torch.zeros_like(x)
        step[index] = 1e-6
        with torch.no_grad():
            expected = (value(x + step, spread) - value(x - step, spread)) / 2e-6
        assert float(gradient[index]) == pytest.approx(float(expected), abs=1e-8)
    assert 0 < int((gradient == 0).sum()) < gradient.numel()
    torch.manual_seed(8)
    (real,) = torch.autograd.grad((layer(x) * weights).sum(), x)
    torch.testing.assert_close(real, gradient)


def test_evaluation_and_probability_zero_are_the_identity():
    x, state = torch.randn(4, 3, 8, 8), torch.get_rng_state()
    assert Disout(0.5).eval()(x) is x
    assert Disout(0.0)(x) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_half_precision_and_everything_distorted():
    y = Disout(0.1)(torch.ones(2000, 200, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert float(y.float().mean()) == pytest.approx(1, abs=0.02)
    torch.manual_seed(0)
    assert Disout(1 - 1e-9)(torch.randn(3, 4)).isfinite().all()


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(80, 6),
        nn.ReLU(inplace=True), nn.Linear(6, 3),
    )  # fmt: skip


def test_hooks_on_all_layers_but_the_last():
    model, x = network(), torch.randn(16, 2, 4, 4)
    keys, undistorted = list(model.state_dict()), copy.deepcopy(model)
    handle = attach_disout(model, probability=0.3, block_size=2)
    assert handle.layers == ("0", "4") and list(model.state_dict()) == keys
    seen = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _m, args, out, name=name: seen.__setitem__(name, (args[0].clone(), out)))
    model(x)
    for name in ("0", "4"):
        assert not torch.allclose(seen[name][1], undistorted.get_submodule(name)(seen[name][0]))
    assert torch.equal(seen["6"][1], undistorted[6](seen["6"][0]))
    model.eval()
    undistorted.load_state_dict(model.state_dict())
    assert torch.equal(model(x), undistorted.eval()(x))
    model.train()
    handle.remove()
    handle.remove()
    assert torch.equal(model(x), undistorted.train()(x))


def test_the_probability_rises_linearly_and_resumes():
    model = network()
    handle = attach_disout(model, ["4"], probability=0.4, steps=4)
    found = []
    for _ in range(6):
        found.append(handle.distortion.dist_prob)
        handle.step()
    assert found == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.4])
    other = attach_disout(network(), ["4"], probability=0.4, steps=4)
    other.step()
    other.load_state_dict({**handle.state_dict(), "step_count": 3})
    assert (other.step_count, other.distortion.dist_prob) == (3, pytest.approx(0.3))


def test_copies_and_pickles_do_not_distort():
    model, x = network(), torch.randn(16, 2, 4, 4)
    plain = copy.deepcopy(model)
    attach_disout(model, probability=0.5)
    expected = plain(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
    assert not torch.equal(model(x), expected)


def test_extra_forwards_draw_the_same_places():
    model, x, y = network(), torch.randn(32, 2, 4, 4), torch.randint(3, (32,))
    attach_disout(model, ["4"], probability=0.5, alpha=0.0)
    curvature = Curvature(model, factor_update_steps=1)
    sam, flatness = SAM(model, curvature=curvature), Flatness(curvature, start=0, every=1)
    places = []
    model[4].register_forward_hook(lambda _m, _a, out: places.append(out == 0))
    for _ in range(2):
        model.zero_grad()
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        (loss + flatness.penalty(x, logits, loss)).backward()
        torch.rand(5)
        sam.replace_gradients(lambda: F.cross_entropy(model(x), y))
    forwards = places[-3:]  # the user's, the penalty's, SAM's
    assert torch.equal(forwards[0], forwards[1]) and torch.equal(forwards[0], forwards[2])
    assert not torch.equal(forwards[0], places[-4])


def test_pruning_goes_on_under_the_hooks():
    torch.manual_seed(0)
    model, x, y = network(), torch.randn(32, 2, 4, 4), torch.randint(3, (32,))
    attach_disout(model, probability=0.5)
    curvature = Curvature(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    pruner = Pruner(model, optimizer, curvature, x[:2], target=Target(params=0.5), total_steps=10)
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        pruner.step()
    assert pruner.params <= 1.01 * 0.5 * pruner.params_start
    assert curvature.layers["0"].norm is model[1]  # seen behind the distortion too


@pytest.mark.parametrize("name", ["residual", "called_twice", "conv_grouped", "sequence_conv"])
def test_other_networks(name):
    model, x = curvature_nets.make(name)
    attach_disout(model, probability=0.2)
    F.cross_entropy(model(x), torch.zeros(5, dtype=torch.long)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_wrong_arguments():
    for value in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="Disout: dist_prob is"):
            Disout(value)
    with pytest.raises(ValueError, match="Disout: block_size is 0"):
        Disout(0.1, block_size=0)
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="Disout: alpha is"):
            Disout(0.1, alpha=value)
    model = network()
    with pytest.raises(TypeError, match="layers is '0'"):
        attach_disout(model, "0")
    with pytest.raises(KeyError, match="no module named '9'"):
        attach_disout(model, ["0", "9"])
    with pytest.raises(ValueError, match="steps is -1"):
        attach_disout(model, steps=-1)
    with pytest.raises(ValueError, match="no layer to distort"):
        attach_disout(nn.Sequential(nn.Linear(2, 2)))
    assert not any(module._forward_hooks for module in model.modules())
