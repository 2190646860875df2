"""Multiply-accumulates on paper against PyTorch's own counter, before and after random cuts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatprune import models
from flatprune.coupling import Coupling, find_coupling
from flatprune.coupling.example_inputs import example_calls
from flatprune.cutting import surgery
from flatprune.pruning.costs import MacCount
from tests.conftest import thorough


class Convolutions(nn.Module):
    """Plain, strided, grouped, depthwise and transposed ones, of each kind that a network may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 12, 3, stride=(2, 1), padding=1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.multiplied = nn.Conv2d(12, 24, (1, 3), groups=12)
        self.grouped = nn.Conv2d(24, 18, 3, padding=1, groups=3, bias=False)
        self.up = nn.ConvTranspose2d(18, 16, 3, stride=2)
        self.grouped_up = nn.ConvTranspose2d(16, 8, 2, groups=2)
        self.depthwise_up = nn.ConvTranspose2d(8, 8, 2, groups=8)
        self.flat = nn.Conv1d(8, 10, 3)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.multiplied(self.depthwise(torch.relu(self.first(x)))))
        x = torch.relu(self.up(torch.relu(self.grouped(x))))
        x = torch.relu(self.depthwise_up(self.grouped_up(x)))
        return self.head(self.flat(x.flatten(2)).relu().mean(2))


class OneOutputAGroup(nn.Module):
    """A transposed convolution of several inputs and one output a group, and one of one input and several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3)
        self.narrow = nn.ConvTranspose2d(8, 4, 3, groups=4)
        self.wide = nn.ConvTranspose2d(4, 12, 3, groups=4)
        self.last = nn.Conv2d(12, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.wide(torch.relu(self.narrow(torch.relu(self.first(x))))))
        return self.head(self.last(x).relu().mean((2, 3)))


class Volume(nn.Module):
    """Convolutions over volumes, and a flatten of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv3d(1, 6, 3, stride=2)
        self.up = nn.ConvTranspose3d(6, 4, 2, stride=2)
        self.head = nn.Linear(4 * 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (4, -1)).movedim(-1, 2)
        x = torch.relu(self.up(torch.relu(self.down(F.pad(x, (0, 1, 0, 0, 1, 1))))))
        return self.head(F.adaptive_avg_pool3d(x, 2).flatten(1))


class Tokens(nn.Module):
    """An encoder of torch, products between activations, and layers that see no sample."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.queries = nn.Parameter(torch.randn(3, 16))
        self.expand = nn.Linear(16, 24)
        self.query = nn.Linear(24, 12)
        self.key = nn.Linear(16, 12)
        self.value = nn.Linear(16, 20, bias=False)
        self.block = nn.TransformerEncoderLayer(20, 4, 32, batch_first=True)
        self.register_buffer("table", torch.randn(3, 5, 2))
        self.bias = nn.Sequential(nn.Linear(2, 7), nn.ReLU(), nn.Linear(7, 1))
        self.down, self.up = nn.Parameter(torch.randn(4, 20)), nn.Parameter(torch.randn(5, 4))
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.embed(x.squeeze(1)))
        q = self.query(torch.relu(self.expand(self.queries)))
        scores = (q @ self.key(x).mT).softmax(-1)
        x = self.block(scores @ torch.relu(self.value(x))).mean(1)
        return self.head(x) + F.linear(x, self.up @ self.down) + self.bias(self.table).sum()


class Recurrent(nn.Module):
    """An LSTM, and a layer whose weight is divided by what products with vectors give."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 12)
        self.recurrent = nn.LSTM(12, 16, batch_first=True)
        self.normed = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 10))
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.recurrent(torch.relu(self.embed(x.squeeze(1))))
        return self.head(torch.relu(self.normed(x[:, -1])))


def images(*shape: int) -> Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


def shipped(name: str, *widths: int) -> Callable[[], tuple[nn.Module, Any]]:
    return lambda: (models.build(name, (3, 16, 16), 10, widths or None), images(3, 16, 16))


def bert() -> tuple[nn.Module, Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40
    )
    return transformers.BertForSequenceClassification(config), {"input_ids": torch.arange(14).view(2, 7)}


def llama() -> tuple[nn.Module, Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config), {"input_ids": torch.arange(14).view(2, 7)}


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "convolutions": lambda: (Convolutions(), images(1, 9, 9)),
    "one_output_a_group": lambda: (OneOutputAGroup(), images(1, 9, 9)),
    "volume": lambda: (Volume(), images(1, 8, 8)),
    "tokens": lambda: (Tokens(), images(1, 6, 8)),
    "recurrent": lambda: (Recurrent(), images(1, 6, 8)),
    "mlp": shipped("mlp"),
    "convnet": shipped("convnet"),
    "mobilenetv2": shipped("mobilenetv2", 8, 4, 8, 8, 12, 12, 12, 16, 24),
    "densenet40": shipped("densenet40", 4, 3, 3, 3),
    "resnet20": shipped("resnet20", 8, 8, 12),
    "vit_tiny": shipped("vit_tiny", 48, 24),
    "bert": bert,
    "llama": llama,
}


def counted(model: nn.Module, inputs: Any) -> int:
    """By PyTorch, of one sample."""
    (call,) = example_calls(model, inputs)
    return models.multiply_accumulates(
        model, *(t[:1] for t in call.args), **{key: t[:1] for key, t in call.kwargs.items()}
    )


def random_removal(coupling: Coupling, seed: int) -> dict[int, Tensor]:
    """Some neurons of every group, the same number from each slice."""
    generator = torch.Generator().manual_seed(seed)
    pruned = {}
    for position, group in enumerate(coupling.groups):
        slices = [(group.group_of == part).nonzero().flatten() for part in range(group.groups)]
        most = max(1, len(slices[0]) // group.multiple)
        count = int(torch.randint(0, most, (1,), generator=generator)) * group.multiple
        if count:
            pruned[position] = torch.cat([part[:count] for part in slices]).sort().values
    return pruned


@pytest.mark.parametrize("name", thorough(NETWORKS, seldom=["mobilenetv2", "densenet40", "vit_tiny"]))
def test_macs_on_paper_are_those_that_torch_counts(name):
    torch.manual_seed(0)
    source, inputs = NETWORKS[name]()
    found = find_coupling(source, inputs)
    removed = set()
    for seed in range(3):
        model, coupling = copy.deepcopy((source, found))
        count = MacCount(coupling.groups, coupling.macs)
        assert count.cost == counted(model, inputs)
        pruned = random_removal(coupling, seed)
        removed |= set(pruned)
        for position, neurons in pruned.items():
            expected = count.cost_without(position, len(neurons))
            count.remove(position, len(neurons))
            assert count.cost == expected
        surgery.plan(model, coupling, pruned).commit()
        assert count.cost == counted(model, inputs)
        assert MacCount(coupling.groups, coupling.macs).cost == count.cost
    assert removed


def test_counting_leaves_the_model_alone():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8), nn.Dropout()).train()
    model[1].eval()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert models.multiply_accumulates(model, torch.randn(1, 4, 6, 6, generator=torch.Generator())) == 16 * 8 * 2 * 9
    assert [module.training for module in model] == [True, False, True]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_the_products_of_an_attention_count():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    by_weights = 5 * sum(weight.numel() for weight in layer.parameters() if weight.dim() == 2)
    assert models.multiply_accumulates(layer, torch.randn(1, 5, 8)) == by_weights + 2 * 5 * 5 * 8
    assert torch.backends.mha.get_fastpath_enabled()
