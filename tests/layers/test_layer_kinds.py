"""What a layer says of itself, whatever its kind; kinds that users register."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_ext import Curvature
from kfac_ext.curvature.draws import Draws
from kfac_ext.curvature.losses import loss_of
from kfac_ext.layers import InputMajorLinear, Linear, layer_of, register
from kfac_ext.layers import layer as kinds
from tests.curvature import curvature_oracles

# module -> (output_dim, input_dim, inputs, groups, area, patch_size, channel_dim); all have 6 outputs
SHAPES = {
    "linear": (nn.Linear(4, 6), (0, 1, 4, 1, 1, 4, -1)),
    "conv1d": (nn.Conv1d(4, 6, 3, bias=False), (0, 1, 4, 1, 3, 12, 1)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), groups=2), (0, 1, 4, 2, 6, 12, 1)),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6), (0, 1, 6, 6, 9, 9, 1)),
    "conv3d": (nn.Conv3d(4, 6, (3, 2, 1), groups=2), (0, 1, 4, 2, 6, 12, 1)),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3), (1, 0, 4, 1, 3, 12, 1)),
    "transposed2d": (nn.ConvTranspose2d(4, 6, (3, 2), groups=2), (1, 0, 4, 2, 6, 12, 1)),
    "transposed3d": (nn.ConvTranspose3d(4, 6, (3, 2, 1), groups=2, bias=False), (1, 0, 4, 2, 6, 12, 1)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_layer_says_what_it_is(name):
    module, expected = SHAPES[name]
    layer = layer_of(module, "body.fc")
    found = (layer.output_dim, layer.input_dim, layer.inputs, layer.groups, layer.area, layer.patch_size)
    assert (*found, layer.channel_dim) == expected and layer.outputs == 6
    assert (layer.name, layer.weight_name) == ("body.fc", "body.fc.weight")
    assert layer.bias_name == (None if module.bias is None else "body.fc.bias")
    assert layer.weight is module.weight and layer.bias is module.bias
    assert layer.is_convolution == (name != "linear") and layer.constant == (module.bias is not None)
    matrix = layer.weight_matrix()
    assert matrix.shape == (6, layer.patch_size)
    assert torch.equal(layer.weight_like(matrix), module.weight)
    assert torch.equal(layer.weight_matrix(2 * module.weight), 2 * matrix)


def test_a_layer_follows_its_module():
    module = nn.Conv2d(4, 6, 3, groups=2)
    layer = layer_of(module)
    module.groups, module.weight = 1, nn.Parameter(torch.zeros(5, 3, 3, 3))
    assert (layer.outputs, layer.inputs, layer.groups, layer.weight_name) == (5, 3, 1, "weight")


def test_modules_of_no_kind_are_refused():
    with pytest.raises(TypeError, match=r"layer_of: mix \(Bilinear\) is of no registered kind"):
        layer_of(nn.Bilinear(2, 2, 2), "mix")
    with pytest.raises(TypeError, match="register: 3 is no subclass"):
        register(3)


class Equalized(nn.Linear):
    """Its weight counts times a constant, as in StyleGAN: no operator takes the parameter itself."""

    def forward(self, x):
        return F.linear(x, self.weight * self.in_features**-0.5, self.bias)


def test_a_kind_of_ones_own_is_one_class(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(Equalized(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"'0' \(Equalized: mul takes its weight\)"):
        Curvature(model).trace(x)

    monkeypatch.setattr(kinds, "_KINDS", dict(kinds._KINDS))

    @register(Equalized)
    class EqualizedLayer(Linear):
        def input_of(self, args, kwargs):
            return super().input_of(args, kwargs) * self.module.in_features**-0.5

    curvature = Curvature(model, generator=torch.Generator().manual_seed(3))
    targets = loss_of("cross_entropy").draw(model(x), Draws(torch.Generator().manual_seed(3)))
    assert isinstance(curvature.layers["0"], EqualizedLayer)
    layers = {"0": (model[0], model[0])}
    inputs, grads = curvature_oracles.observe(model, layers, x, curvature_oracles.cross_entropy_sum(targets))
    A, G = curvature_oracles.factors(nn.Linear(4, 6), [inputs["0"][0] / 2], grads["0"], "expand", True, 5)
    torch.testing.assert_close(curvature.factors["0.A"], A[0])
    torch.testing.assert_close(curvature.factors["0.G"], G[0])


class Squared(nn.Module):
    """A weight [in, out] that is called otherwise and multiplies squares."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.kernel, self.shift = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return torch.einsum("ni,io->no", x.square(), self.kernel) + self.shift


def test_a_kind_says_how_its_weight_is_called(monkeypatch):
    monkeypatch.setattr(kinds, "_KINDS", dict(kinds._KINDS))

    @register(Squared)
    class SquaredLayer(InputMajorLinear):
        weight_key, bias_key = "kernel", "shift"

        def input_of(self, args, kwargs):
            return super().input_of(args, kwargs).square()

    torch.manual_seed(0)
    model = nn.Sequential(Squared(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    plain, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double(), torch.randn(5, 4).double()
    plain.load_state_dict(dict(zip(plain.state_dict(), (model[0].kernel.T, *list(model.state_dict().values())[1:]))))
    found, expected = (Curvature(net, generator=torch.Generator().manual_seed(3)) for net in (model, plain))
    model(x), plain(x.square())
    layer = found.layers["0.kernel"]
    assert (layer.weight_name, layer.bias_name, layer.output_dim) == ("0.kernel", "0.shift", 1)
    for side in "AG":
        torch.testing.assert_close(found.factors[f"0.kernel.{side}"], expected.factors[f"0.{side}"])
    torch.testing.assert_close(layer.folded_weight(), expected.layers["0"].folded_weight())
    again = Curvature(model)
    again.load_state_dict(found.state_dict())
    assert isinstance(again.layers["0.kernel"], SquaredLayer)
