from __future__ import annotations

import pytest
import torch
from pruning_networks import NETWORKS, Concat, Grouped, chain, digits, mlp, resnet20
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from flatprune.cutting.graph import neuron_groups
from flatprune.cutting.neurons import CONSUMER, FOLLOWER, PRODUCER


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


class _TwoNames(nn.Module):
    """One layer under two names, read by the head and reading the body."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(64, 12)
        self.shared = nn.Linear(12, 12)
        self.alias = self.shared
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.body(x.flatten(1)))
        return self.head(torch.relu(self.alias(torch.relu(self.shared(x)))))


def test_a_layer_with_two_names_is_traced_and_left_as_it_was():
    model = _TwoNames()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    group = groups_of(model)["body"]
    assert set(roles(group, PRODUCER)) == {"body", "shared"}
    assert isinstance(model.shared.weight, nn.Parameter)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_tied_weights_leave_the_rest_prunable():
    tied = _tied()
    model = nn.Sequential(*tied[:4], nn.Linear(16, 14), nn.ReLU(), nn.Linear(14, 10))
    coupling = neuron_groups(model, digits()[0][:2])
    assert [group.name for group in coupling.groups] == ["4"]
    assert all("share one parameter" in coupling.refused[name] for name in ("1", "2", "3"))
    assert model[3].weight is model[2].weight


def test_heads_of_an_attention_are_neurons():
    groups = groups_of(NETWORKS["attention"]())
    assert set(groups) == {"attn.qkv", "mlp.1"}
    (rows,) = groups["attn.qkv"].of_role(PRODUCER)
    (columns,) = groups["attn.qkv"].of_role(CONSUMER)
    assert rows.index[1].tolist() == [*range(4, 8), *range(28, 32), *range(52, 56)]
    assert columns.name == "attn.proj"
    assert columns.index[1].tolist() == [4, 5, 6, 7]


def test_attention_whose_projection_does_not_follow_is_refused():
    model = NETWORKS["attention"]()
    forward = model.attn.forward

    def reshapes_to_the_input(x: Tensor) -> Tensor:
        heads = forward.__self__
        q, k, v = heads.qkv(x).reshape(*x.shape[:2], 3, 6, 4).permute(2, 0, 3, 1, 4)
        return heads.proj(torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    model.attn.forward = reshapes_to_the_input
    assert "trial cut" in neuron_groups(model, digits()[0][:2]).refused["attn.qkv"]


class _Words(nn.Module):
    """Embedded words through stock attention and a perceptron beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 24, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.words(x)).mean(1))


def test_embeddings_and_stock_attention_are_left_alone_with_a_word():
    coupling = neuron_groups(_Words(), torch.randint(0, 20, (2, 5)))
    assert [group.name for group in coupling.groups] == ["layer.linear1"]
    assert "left alone" in coupling.refused["words"]
    assert "cannot lose heads" in coupling.refused["layer.self_attn"]
    assert not {"words", "layer.self_attn"} & coupling.expected


class _Causal(nn.Module):
    """Padded convolutions over time whose last steps are sliced off."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(8, 6, 3, padding=2)
        self.second = nn.Conv1d(6, 6, 3, padding=2)
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x[:, 0])[:, :, :-2])
        return self.head((torch.relu(self.second(x)[:, :, :-2]) + x).mean(2))


def test_slices_along_time_keep_the_channels():
    groups = groups_of(_Causal())
    assert set(groups) == {"first"}
    assert set(roles(groups["first"], PRODUCER)) == {"first", "second"}


def test_nested_shares_take_the_finer_and_crossed_ones_are_refused():
    def stack(first: int, second: int) -> nn.Module:
        norms = nn.GroupNorm(first, 12), nn.ReLU(), nn.GroupNorm(second, 12)
        return nn.Sequential(nn.Conv2d(1, 12, 1), *norms, nn.Flatten(), nn.Linear(768, 10))

    assert groups_of(stack(2, 4))["0"].partitions == groups_of(stack(4, 2))["0"].partitions == 4
    assert groups_of(stack(1, 12))["0"].partitions == 1
    reason = neuron_groups(stack(4, 3), digits()[0][:2]).refused["0"]
    assert "group norm '3' cuts the neurons into other shares" in reason


@pytest.mark.parametrize(
    ("name", "exclude", "left"),
    [
        ("attention", ["attn"], {"mlp.1"}),
        ("attention", [NETWORKS["attention"].Heads], {"mlp.1"}),
        ("attention", ["mlp"], {"attn.qkv"}),
        ("sequence", [nn.Conv1d], set()),
        ("transposed", [nn.ConvTranspose2d], {"down", "mix"}),
        ("transposed", ["up"], {"down", "grouped", "mix"}),
        ("norms", [nn.LayerNorm], {"first", "second", "third"}),
        ("norms", [nn.GroupNorm], {"fourth", "fifth"}),
    ],
)
def test_exclude_reaches_every_kind_of_layer(name, exclude, left):
    found = set(groups_of(NETWORKS[name](), exclude=exclude))
    assert found == left


def test_a_wrong_channel_is_found_even_where_a_bias_dwarfs_the_signal():
    model = _Shuffles()
    with torch.no_grad():
        model.after.weight *= 1e-4
        model.head.bias += 1e3
    assert "trial cut" in neuron_groups(model, digits()[0][:2]).refused["conv"]


def test_unbatched_tuple_of_inputs():
    assert set(groups_of(mlp(), (digits()[0][:2],))) == {"1", "3"}
