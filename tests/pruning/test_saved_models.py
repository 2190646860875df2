"""A pruned model of one's own, saved and loaded: whole, as a state dict into a fresh one, and with its training."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatprune
from tests.conftest import thorough


class Convolutions(nn.Module):
    """Batch and group norms, a depthwise and a grouped convolution, and a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.grouped, self.group_norm = nn.Conv2d(12, 16, 3, stride=2, groups=2), nn.GroupNorm(4, 16)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(16 * 9, 10), nn.PReLU(10), nn.Linear(10, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.norm(self.first(x[:, None])))))
        return self.head(torch.relu(self.group_norm(self.grouped(x))))


class Encoder(nn.Module):
    """torch's own encoder: heads of `nn.MultiheadAttention`, hidden layers, the residual stream."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


class Recurrent(nn.Module):
    """An LSTM of two layers between linear ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 12)
        self.lstm = nn.LSTM(12, 14, num_layers=2, batch_first=True)
        self.head = nn.Linear(14, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(torch.relu(self.embed(x)))[0].mean(1))


class Heads(nn.Module):
    """Attention whose view holds the number of heads, and a reshape that holds a width in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.shape = 4, (2, 10)
        self.qkv, self.proj = nn.Linear(8, 48), nn.Linear(16, 8)
        self.wide, self.head = nn.Linear(8, 20), nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        samples, length, _ = x.shape
        q, k, v = self.qkv(x).view(samples, length, 3, self.num_heads, 4).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.mT).softmax(-1) @ v
        x = x + self.proj(mixed.transpose(1, 2).reshape(samples, length, self.num_heads * 4))
        x = torch.relu(self.wide(x.mean(1))).view(samples, *self.shape)
        return self.head(x.flatten(1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "convolutions": Convolutions,
    "encoder": Encoder,
    "encoder_norm_first": lambda: Encoder(norm_first=True, activation="gelu"),
    "recurrent": Recurrent,
    "heads": Heads,
}


def batch(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(step))
    return x, (2 * x[:, 0, :4] + x[:, 1, :4]).argmax(1)


class Training:
    """A model, its optimizer, curvature and pruner; one event of pruning at steps 2, 4 and 6."""

    def __init__(self, model: nn.Module, params: float = 0.5, **options: Any) -> None:
        self.model, self.done = model.train(), 0
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        self.curvature = flatprune.Curvature(model, generator=torch.Generator().manual_seed(0))
        self.pruner = flatprune.Pruner(
            model,
            self.optimizer,
            self.curvature,
            batch(0)[0][:2],
            target=flatprune.Target(params),
            total_steps=6,
            schedule=flatprune.CubicSchedule(6, 0.0, 1.0, every=2),
            measure=False,
            **{"criterion": "l1", "compensate": False, **options},
        )

    def train(self, steps: int) -> Training:
        for _ in range(steps):
            self.done += 1
            x, y = batch(self.done)
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
            self.pruner.step()
        return self

    def state(self) -> dict[str, Any]:
        parts = ("model", "optimizer", "curvature", "pruner")
        return {"done": self.done, **{part: getattr(self, part).state_dict() for part in parts}}

    @classmethod
    def resumed(cls, model: nn.Module, state: dict[str, Any], **options: Any) -> Training:
        flatprune.take_tensors(model, state["model"], attributes=state["pruner"]["attributes"])
        training = cls(model, **options)
        for part in ("optimizer", "curvature", "pruner"):
            getattr(training, part).load_state_dict(state[part])
        training.done = state["done"]
        return training


def pruned(name: str, **options: Any) -> Training:
    training = Training(NETWORKS[name](), **options).train(6)
    assert training.pruner.cost <= 1.01 * training.pruner.goal
    return training


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(batch(100)[0])


def through_file(value: Any, *, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_whole_model_in_a_file_a_pickle_and_a_copy(name):
    model = pruned(name).model
    expected = outputs(model)
    for again in (
        through_file(model, weights_only=False),
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
    ):
        assert torch.equal(outputs(again), expected)
        again.train()(batch(1)[0]).sum().backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in again.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_state_dict_into_a_fresh_model(name):
    training = pruned(name)
    expected, fresh = outputs(training.model), NETWORKS[name]()
    state = through_file(training.model.state_dict(), weights_only=True)
    attributes = through_file(training.pruner.state_dict(), weights_only=True)["attributes"]
    flatprune.take_tensors(fresh, state, attributes=attributes)
    assert torch.equal(outputs(fresh), expected)
    fresh.train()(batch(1)[0]).sum().backward()
    for own, other in zip(training.model.modules(), fresh.modules()):
        held = {key: value for key, value in vars(own).items() if type(value) in (int, tuple)}
        assert held == {key: vars(other)[key] for key in held}
    fresh.load_state_dict(state)  # the shapes are those of the state now
    deeper = copy.deepcopy(fresh)
    assert torch.equal(outputs(deeper), expected)


CONTINUED = [*((name, "l1") for name in NETWORKS), ("convolutions", "obs")]


@pytest.mark.parametrize(
    ("name", "criterion"), thorough(CONTINUED, seldom=[("encoder_norm_first", "l1"), ("convolutions", "l1")])
)
def test_training_goes_on_exactly(name, criterion):
    options = {"criterion": criterion, "compensate": "auto"}
    start = NETWORKS[name]()
    whole = Training(copy.deepcopy(start), **options).train(6)
    first = Training(start, **options).train(3)
    assert 0 < len(first.pruner.history) < len(whole.pruner.history)
    state = through_file(first.state(), weights_only=True)
    second = Training.resumed(NETWORKS[name](), state, **options).train(3)
    assert second.pruner.widths() == whole.pruner.widths()
    assert second.pruner.history == whole.pruner.history
    for (key, one), other in zip(whole.model.state_dict().items(), second.model.state_dict().values()):
        assert torch.equal(one, other), key


def test_heads_of_an_encoder_fit_after_loading():
    heads = ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]
    training = pruned("encoder", layers=heads, min_width=4, params=0.8)
    fresh = Encoder()
    flatprune.take_tensors(fresh, training.model.state_dict())
    for own, other in zip(training.model.encoder.layers, fresh.encoder.layers):
        assert own.self_attn.num_heads == other.self_attn.num_heads < 4
        assert other.self_attn.head_dim == 4
    padding = torch.zeros(16, 8, dtype=torch.bool)
    padding[:, 6:] = True
    x = torch.randn(16, 8, 16)
    for model in (training.model.eval(), fresh.eval()):
        with torch.no_grad():
            found = model.encoder(x, src_key_padding_mask=padding)
            expected = model.encoder(x[:, :6])
        torch.testing.assert_close(found[:, :6], expected)
