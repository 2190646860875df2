"""Which layers bear what."""

import pytest
import torch
from torch import nn

import flatprune


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3)).double()


def test_each_entry_is_the_network_without_the_lowest_neurons():
    model, x = network(), torch.randn(16, 6, dtype=torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = flatprune.sensitivity(model, x, lambda net: float(net(x).square().mean()), fractions=(0.25, 0.5))
    assert found.whole == float(model(x).square().mean())
    for position, layer in ((0, model[0]), (2, model[2])):
        order = layer.weight.norm(dim=1).argsort()
        for fraction in (0.25, 0.5):
            gone = order[: int(fraction * len(order))]

            def without(_module, _inputs, output, gone=gone):
                return output.index_fill(1, gone, 0.0)

            handle = model[position + 1].register_forward_hook(without)
            assert found.values[str(position)][fraction] == pytest.approx(float(model(x).square().mean()), rel=1e-12)
            handle.remove()
    assert found.widths == {"0": 8, "2": 12}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_grouped_channels_lose_as_many_from_each_slice():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2), nn.Flatten(), nn.Linear(6, 2))
    widths = []
    found = flatprune.sensitivity(
        model, torch.randn(2, 3, 3, 3), lambda net: widths.append(net[2].weight.shape[1]) or 0.0, fractions=(0.1, 0.4)
    )
    assert 0.1 not in found.values["0"]  # less than one of each slice
    assert widths[1] == 3  # 0.4 of 8 is 3, one of each slice


def test_with_factors_the_curvature_judges(tmp_path):
    model, x = network(), torch.randn(32, 6, dtype=torch.float64)
    curvature = flatprune.Curvature(model)
    y = torch.arange(32) % 3
    nn.functional.cross_entropy(model(x), y).backward()
    judged = flatprune.sensitivity(model, x, lambda net: 1.0, criterion="obd", curvature=curvature, fractions=(0.5,))
    assert str(judged).splitlines()[-1] == "as it is: 1"
    judged.plot(str(tmp_path / "picture.png"))
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_what_evaluates_is_a_function_to_a_number():
    model, x = network(), torch.randn(2, 6, dtype=torch.float64)
    with pytest.raises(TypeError, match="evaluate is 3"):
        flatprune.sensitivity(model, x, 3)
    with pytest.raises(TypeError, match="evaluate returned NoneType, expected a number"):
        flatprune.sensitivity(model, x, lambda net: None)
    with pytest.raises(ValueError, match="the curvature belongs to another model"):
        flatprune.sensitivity(model, x, lambda net: 0.0, curvature=flatprune.Curvature(network()))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"fractions": (0.5, 1.0)}, ["fraction is 1.0", "above 0 and below 1"]),
        ({"criterion": "obs"}, ["'obs' needs factors", "l2"]),
        ({"exclude": ["0", "2"]}, ["no layer can be pruned"]),
    ],
)
def test_bad_input_is_named(options, words):
    with pytest.raises(ValueError) as error:
        flatprune.sensitivity(network(), torch.randn(2, 6, dtype=torch.float64), lambda net: 0.0, **options)
    assert all(word in str(error.value) for word in words)
