"""Layers that look like one of torch and compute something else: the curvature is of what they compute, or absent."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_ext import Curvature


class NormAndActivation(nn.BatchNorm1d):
    """A batch norm with the activation inside."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class SamePadding(nn.Conv2d):
    """A convolution that pads its input in its forward, more on one side than on the other."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Standardised(nn.Linear):
    """A Linear that reads its input in units of its deviation."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / x.std(0, keepdim=True))


class Scaled(nn.Linear):
    """A Linear with a gain on its weight."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.gain = nn.Parameter(torch.full((outputs, 1), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.gain, self.bias)


class Divide(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.std(0, keepdim=True)


def factors(model: nn.Module, x: Tensor) -> tuple[Curvature, dict[str, Tensor]]:
    """Factors of one forward, with labels that are drawn the same for each model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        curvature = Curvature(model, factor_update_steps=1, generator=torch.Generator().manual_seed(0))
        model(x)
        return curvature, {name: curvature.factors[name].clone() for name in curvature.factors}


def test_a_norm_with_an_activation_is_not_folded_as_a_plain_one():
    plain = nn.Sequential(nn.Linear(20, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5)).double()
    fused = nn.Sequential(nn.Linear(20, 16), NormAndActivation(16), nn.Identity(), nn.Linear(16, 5)).double()
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(64, 20, dtype=torch.double)
    (_, expected), (curvature, found) = factors(plain, x), factors(fused, x)
    if curvature.layers["0"].norm_name is not None:
        torch.testing.assert_close(found["0.G"], expected["0.G"])
    torch.testing.assert_close(found["3.G"], expected["3.G"])


@pytest.mark.parametrize(
    ("layer", "same", "shape"),
    [
        (SamePadding(3, 4, 2), nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 4, 2)), (16, 3, 5, 5)),
        (Standardised(6, 4), nn.Sequential(Divide(), nn.Linear(6, 4)), (16, 6)),
    ],
    ids=["padding", "deviation"],
)
def test_what_a_subclass_does_to_its_input_is_in_its_factor(layer, same, shape):
    """The factor is of what the operator reads, or the layer has none."""
    same[1].load_state_dict(layer.state_dict())
    x = torch.randn(shape, dtype=torch.double)
    rest = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(4 * (25 if len(shape) == 4 else 1), 3))
    (_, expected), (curvature, found) = (factors(nn.Sequential(part, rest).double(), x) for part in (same, layer))
    if "0" in curvature.layers:
        for side in "AG":
            torch.testing.assert_close(found[f"0.{side}"], expected[f"0.1.{side}"])
    torch.testing.assert_close(found["1.2.A"], expected["1.2.A"])


def test_a_subclass_with_a_computed_weight_has_no_factors():
    """Its `weight` is not what multiplies the input, so no factor is that weight's curvature."""
    model = nn.Sequential(Scaled(6, 4), nn.ReLU(), nn.Linear(4, 3))
    curvature, _ = factors(model, torch.randn(16, 6))
    assert set(curvature.layers) == {"2"}


def test_a_subclass_that_keeps_the_forward_is_its_base():
    class Named(nn.Linear):
        """Initialised otherwise."""

        def reset_parameters(self) -> None:
            nn.init.orthogonal_(self.weight)
            nn.init.zeros_(self.bias)

    curvature, found = factors(nn.Sequential(Named(6, 4), nn.ReLU(), Named(4, 3)), torch.randn(16, 6))
    assert set(curvature.layers) == {"0", "2"}
    assert found["0.A"].isfinite().all()
