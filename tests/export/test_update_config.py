"""Pruned Hugging Face models through `save_pretrained` and `from_pretrained`."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatprune
from tests.conftest import prepare_for

IDS = torch.arange(14).view(2, 7) * 3 % 50
IMAGES = torch.linspace(-1, 1, 384).view(2, 3, 8, 8)
SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "intermediate_size": 32}
WORDS = {"vocab_size": 50, "max_position_embeddings": 16}


@pytest.fixture(scope="module", autouse=True)
def _transformers():
    prepare_for("transformers")


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification  # takes seconds, so not for those who collect

    return BertForSequenceClassification(BertConfig(**SIZES, **WORDS, num_attention_heads=4, num_labels=5))


def llama(**sizes: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 6}
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **WORDS, **heads, "use_cache": False, **sizes}))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**SIZES, num_attention_heads=4, image_size=8, patch_size=4))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, use_cache=False, bos_token_id=0, eos_token_id=0))


class Logits(nn.Module):
    """A model that returns one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def pruned(model: nn.Module, x: Tensor, params: float, exclude: tuple[str, ...] = (), **options: object) -> nn.Module:
    """The model after two steps with one event; layers whose name ends on one of `exclude` stay."""
    network = Logits(model).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    stay = [name for name, _ in network.named_modules() if name.endswith(exclude)] if exclude else []
    options = {"schedule": flatprune.CubicSchedule(2, 1.0, 1.0), "measure": False, "exclude": stay, **options}
    pruner = flatprune.Pruner(
        network,
        optimizer,
        flatprune.Curvature(network),
        x,
        target=flatprune.Target(params),
        total_steps=2,
        **options,
    )
    for _ in range(2):
        logits = network(x)
        logits = logits.reshape(-1, logits.shape[-1])
        optimizer.zero_grad()
        F.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[-1]).backward()
        optimizer.step()
        pruner.step()
    assert pruner.params <= 1.01 * params * pruner.params_start
    return model


def check_round_trip(model: nn.Module, x: Tensor, folder) -> None:
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder)
    with torch.no_grad():
        expected, found = model.eval()(x).logits, again.eval()(x).logits
    assert torch.equal(expected, found)


@pytest.mark.parametrize(
    ("build", "x", "exclude"),
    [
        (bert, IDS, ("attention.self", "embeddings", "pooler")),
        (vit, IMAGES, (".attention", "embeddings")),
        (llama, IDS, ("self_attn", "embed_tokens")),
    ],
)
def test_the_hidden_layers_of_transformers(build, x, exclude, tmp_path):
    model = pruned(build(), x, 0.8, exclude, tie_widths=True)
    changed = flatprune.update_config(model, x)
    before, after = changed.pop("intermediate_size")
    assert changed == {}
    assert before == 32 > after == model.config.intermediate_size
    check_round_trip(model, x, tmp_path)
    assert flatprune.update_config(model) == {}


def test_heads_of_grouped_queries(tmp_path):
    model = pruned(llama(), IDS, 0.75, ("embed_tokens", "mlp"), tie_widths=True)
    changed = flatprune.update_config(model)  # head_dim 2 instead of 6 would have the same shapes
    assert changed == {"num_attention_heads": (6, 2), "num_key_value_heads": (3, 1)}
    check_round_trip(model, IDS, tmp_path)


def test_everything_of_a_llama(tmp_path):
    model = pruned(llama(), IDS, 0.35, tie_widths=True, round_to=6)
    changed = flatprune.update_config(model, {"input_ids": IDS})
    assert {"hidden_size", "intermediate_size"} <= changed.keys()
    assert model.config.hidden_size == model.lm_head.weight.shape[1] < 24
    check_round_trip(model, IDS, tmp_path)


def test_a_number_that_was_not_given(tmp_path):
    model = pruned(gpt2(), IDS, 0.7, ("wte", "attn"), tie_widths=["*.mlp.c_fc"])
    assert flatprune.update_config(model) == {"n_inner": (None, model.config.n_inner)}
    assert model.transformer.h[1].mlp.c_fc.weight.shape == (24, model.config.n_inner)
    check_round_trip(model, IDS, tmp_path)


def test_heads_that_no_configuration_has():
    model = pruned(bert(), IDS, 0.85, ("embeddings", "pooler", "intermediate"), tie_widths=True)
    before = copy.deepcopy(model.config.to_dict())
    wanted = r"numbers of BertConfig give '.*layer.0.attention.self.query.weight' the shape \(\d+, 24\), .* \(24, 24\)"
    with pytest.raises(ValueError, match=wanted):
        flatprune.update_config(model)
    assert model.config.to_dict() == before


def test_widths_that_differ_between_layers():
    model = pruned(bert(), IDS, 0.85, ("attention.self", "embeddings", "pooler", "layer.0.intermediate"))
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(ValueError, match=r"'.*intermediate.dense.weight' has \(\d+, 24\); prune with tie_widths=True"):
        flatprune.update_config(model)
    assert model.config.to_dict() == before


def test_a_model_without_a_configuration():
    with pytest.raises(TypeError, match="update_config: Linear has no config with to_dict"):
        flatprune.update_config(nn.Linear(3, 3))
