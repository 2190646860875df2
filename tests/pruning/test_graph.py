from __future__ import annotations

import pytest
import torch
from pruning_networks import NETWORKS, Concat, Grouped, chain, digits, mlp, resnet20
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from flatprune.graph import neuron_groups
from flatprune.neurons import CONSUMER, FOLLOWER, PRODUCER


def groups_of(model: nn.Module, x: Tensor | None = None, **options: object) -> dict:
    return {g.name: g for g in neuron_groups(model, digits()[0][:2] if x is None else x, **options).groups}


def roles(group, role: str) -> dict[str, tuple[int, ...]]:
    return {member.name: tuple(member.index.shape) for member in group.of_role(role)}


def test_chain_has_norms_and_all_positions_behind_a_flatten():
    groups = groups_of(chain())
    assert {name: group.width for name, group in groups.items()} == {"0": 8, "3": 12, "8": 20}
    assert roles(groups["3"], FOLLOWER) == {"4": (12, 1)}
    (consumer,) = groups["3"].of_role(CONSUMER)
    assert consumer.name == "8"
    assert torch.equal(consumer.index, torch.arange(12 * 16).view(12, 16))


def test_residual_stream_is_one_group():
    groups = groups_of(resnet20())
    stream = groups["conv"]
    assert set(roles(stream, PRODUCER)) == {"conv", *(f"stages.0.{i}.conv2" for i in range(3))}
    assert "stages.1.0.shortcut.0" in roles(stream, CONSUMER)
    assert "fc" in roles(groups["stages.2.0.conv2"], CONSUMER)
    assert len(groups) == 3 + 9  # three streams and the inside of nine blocks


def test_depthwise_convolution_follows():
    groups = groups_of(NETWORKS["depthwise"]())
    assert set(roles(groups["expand"], FOLLOWER)) == {"depthwise", "norm", "act"}
    assert set(groups) == {"expand", "project"}


def test_grouped_convolution_asks_for_equal_shares():
    groups = groups_of(Grouped())
    for name, width in (("first", 12), ("grouped", 18)):
        assert groups[name].partitions == 3
        assert torch.equal(groups[name].partition, torch.arange(width) // (width // 3))


def test_layer_called_twice_is_producer_and_consumer():
    mix = groups_of(Grouped())["mix"]
    assert "twice" in roles(mix, PRODUCER)
    assert "twice" in roles(mix, CONSUMER)


def test_concatenation_and_halves():
    groups = groups_of(Concat())
    (left,) = groups["left"].of_role(CONSUMER)
    (right,) = groups["right"].of_role(CONSUMER)
    assert left.index.flatten().tolist() == list(range(6))
    assert right.index.flatten().tolist() == list(range(6, 14))
    gate = groups["gate"].of_role(PRODUCER)[0]
    assert gate.index.tolist() == [[i, i + 8] for i in range(8)]


def test_output_and_unused_layers_are_left_alone():
    model = Concat()
    coupling = neuron_groups(model, digits()[0][:2])
    assert coupling.refused == {"head": "it is an output of the model"}
    assert coupling.expected == {"head"}


class _AddsItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Linear(64, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.head(torch.relu(self.same(x) + x))


class _Shuffles(nn.Module):
    """A channel shuffle, through which torch-pruning hands down the wrong channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 1)
        self.after = nn.Conv2d(8, 8, 3, groups=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x.view(len(x), 2, 4, 8, 8).transpose(1, 2).reshape(len(x), 8, 8, 8)
        return self.head(self.after(x).mean((2, 3)))


class _ReturnsFeatures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(64, 12)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.relu(self.body(x.flatten(1)))
        return self.head(features), features


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 10))
    model[3].weight = model[2].weight
    return model


@pytest.mark.parametrize(
    ("model", "layer", "reason"),
    [
        (_AddsItsInput(), "same", "coupled to the input"),
        (_Shuffles(), "conv", "trial cut"),
        (_ReturnsFeatures(), "body", "output of the model"),
        (_tied(), "1", "share one parameter"),
        (
            nn.Sequential(nn.Conv2d(1, 8, 1), nn.LayerNorm((8, 8, 8)), nn.Flatten(), nn.Linear(512, 10)),
            "0",
            "LayerNorm '1' over (8, 8, 8)",
        ),
        (nn.Sequential(nn.Flatten(), weight_norm(nn.Linear(64, 8)), nn.Linear(8, 10)), "1", "parametrized"),
        (
            nn.Sequential(nn.Conv2d(1, 6, 1), nn.Conv2d(6, 12, 1, groups=6), nn.Flatten(), nn.Linear(768, 10)),
            "0",
            "1 channels a group cannot be cut",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_with_a_reason(model, layer, reason):
    coupling = neuron_groups(model, digits()[0][:2])
    assert reason in coupling.refused[layer]
    assert layer not in coupling.expected or "output" in reason
    assert layer not in {group.name for group in coupling.groups}


def test_frozen_parameters_are_traced_too():
    model = chain().requires_grad_(False)
    assert set(groups_of(model)) == {"0", "3", "8"}


def test_exclude_by_name_container_and_type():
    assert set(groups_of(chain(), exclude=["3"])) == {"0", "8"}
    assert set(groups_of(chain(), exclude=[nn.Linear])) == {"0", "3"}
    assert "conv" not in groups_of(NETWORKS["resnet"](), exclude=["stages.0"])
    with pytest.raises(KeyError, match="'nowhere'"):
        groups_of(chain(), exclude=["nowhere"])


def test_tracing_leaves_the_model_as_it_was():
    model = chain().train()
    model[4].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    neuron_groups(model, digits()[0][:2])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training
    assert not model[4].training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_unbatched_tuple_of_inputs():
    assert set(groups_of(mlp(), (digits()[0][:2],))) == {"1", "3"}
