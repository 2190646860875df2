"""`PrunableAttention` computes what `nn.MultiheadAttention` does, argument by argument."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatprune.coupling import find_coupling
from flatprune.coupling.attention import PrunableAttention, make_prunable, undo_prunable

N, T, S, E, H = 3, 4, 5, 12, 4  # samples, targets, sources, width, heads

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_bias": {"bias": False},
    "batch_first": {"batch_first": True},
    "other_widths": {"kdim": 7, "vdim": 9},
    "other_widths_no_bias": {"kdim": 7, "vdim": 9, "bias": False, "batch_first": True},
    "key_width": {"kdim": 7},
    "bias_kv": {"add_bias_kv": True},
    "zero_position": {"add_zero_attn": True, "batch_first": True},
    "both_positions": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 7, "vdim": 9},
}
MASKS = ("none", "bool", "float", "bool_by_head", "float_by_head")


def layers(**options: Any) -> tuple[nn.MultiheadAttention, PrunableAttention]:
    """torch's layer with random biases too, and ours of the same tensors."""
    plain = nn.MultiheadAttention(E, H, **options).double()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_()
    return plain, PrunableAttention.of(copy.deepcopy(plain))


def inputs(options: dict[str, Any], *, batched: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    widths = (E, options.get("kdim", E), options.get("vdim", E))
    found = [torch.randn(N, length, width).double() for length, width in zip((T, S, S), widths)]
    if not batched:
        found = [t[0] for t in found]
    elif not options.get("batch_first"):
        found = [t.transpose(0, 1) for t in found]
    query, key, value = found
    return query, key, value


def mask_of(kind: str, samples: int | None = N) -> Tensor | None:
    if kind == "none":
        return None
    shape = (T, S) if not kind.endswith("by_head") else ((samples or 1) * H, T, S)
    hidden = torch.rand(shape) < 0.4
    hidden[..., 0] = False  # a row without any source is not a number in both
    return hidden if kind.startswith("bool") else torch.randn(shape).double().masked_fill(hidden, float("-inf"))


def padding_of(kind: str, samples: int | None = N) -> Tensor | None:
    if kind == "none":
        return None
    hidden = torch.zeros((S,) if samples is None else (samples, S), dtype=torch.bool)
    hidden[..., 3:] = True
    if samples is not None:
        hidden[0] = False
    return hidden if kind == "bool" else torch.zeros(hidden.shape).double().masked_fill(hidden, float("-inf"))


def check(plain: nn.Module, ours: nn.Module, *arguments: Any, **options: Any) -> None:
    expected, found = plain(*arguments, **options), ours(*arguments, **options)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
    if expected[1] is None:
        assert found[1] is None
    else:
        torch.testing.assert_close(found[1], expected[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_masks_and_weights(kind, training):
    plain, ours = (layer.train(training) for layer in layers(**KINDS[kind]))
    x = inputs(KINDS[kind])
    for mask, padding in itertools.product(MASKS, ("none", "bool", "float")):
        if "none" not in (mask, padding) and ("bool" in mask) != (padding == "bool"):
            continue  # torch warns of mixed types
        arguments = {"attn_mask": mask_of(mask), "key_padding_mask": padding_of(padding)}
        check(plain, ours, *x, **arguments)
        check(plain, ours, *x, **arguments, need_weights=False)
        check(plain, ours, *x, **arguments, average_attn_weights=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_without_a_batch(kind):
    plain, ours = layers(**KINDS[kind])
    x = inputs(KINDS[kind], batched=False)
    for mask, padding in itertools.product(MASKS, ("none", "bool")):
        if padding == "bool" and mask.startswith("float"):
            continue
        arguments = {"attn_mask": mask_of(mask, None), "key_padding_mask": padding_of(padding, None)}
        check(plain, ours, *x, **arguments)
        check(plain, ours, *x, **arguments, need_weights=False, average_attn_weights=False)


@pytest.mark.parametrize("batch_first", [False, True])
def test_one_input_for_all_three(batch_first):
    for plain, ours in (
        layers(batch_first=batch_first),
        (layer.eval() for layer in layers(batch_first=batch_first)),
    ):
        x = torch.randn(N, T, E).double()
        check(plain, ours, x, x, x)
        check(plain, ours, x[0], x[0], x[0], need_weights=False)
        with torch.no_grad():  # torch's own takes its fused path here
            check(plain, ours, x, x, x, need_weights=False)
            check(plain, ours, x, x, x, average_attn_weights=False)


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_causal_mask_with_its_hint(need_weights):
    plain, ours = layers(batch_first=True)
    x = torch.randn(N, T, E).double()
    for dtype in (torch.float64, torch.bool):
        mask = torch.ones(T, T, dtype=torch.bool).triu(1)
        if dtype != torch.bool:
            mask = nn.Transformer.generate_square_subsequent_mask(T, dtype=dtype)
        check(plain, ours, x, x, x, attn_mask=mask, is_causal=True, need_weights=need_weights)
        padding = torch.zeros(N, T).double() if dtype != torch.bool else torch.zeros(N, T, dtype=torch.bool)
        check(plain, ours, x, x, x, attn_mask=mask, is_causal=True, key_padding_mask=padding)


def test_the_hint_alone_is_an_error_in_both():
    plain, ours = layers(batch_first=True)
    x = torch.randn(N, T, E).double()
    for layer in (plain, ours):
        with pytest.raises(RuntimeError, match="attn_mask"):
            layer(x, x, x, is_causal=True, need_weights=False)


def test_gradients():
    plain, ours = layers(add_bias_kv=True)
    x, mask = inputs({}), mask_of("float")
    for layer in (plain, ours):
        layer(*x, attn_mask=mask)[0].square().sum().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_in_training(need_weights):
    plain, ours = layers(dropout=0.3, batch_first=True)
    x = torch.randn(1, T, E).double()
    means = []
    for layer in (plain, ours):
        torch.manual_seed(0)
        with torch.no_grad():
            draws = torch.stack([layer(x, x, x, need_weights=need_weights)[0] for _ in range(4000)])
        means.append((draws.mean(0), draws.std(0)))
    (expected, spread), (found, own) = means
    assert float(((found - expected).abs() / (spread / 4000**0.5 + 1e-12)).max()) < 6.0  # of errors of a difference
    torch.testing.assert_close(own, spread, rtol=0.15, atol=1e-6)
    check(plain.eval(), ours.eval(), x, x, x, need_weights=need_weights)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("mask", ["none", "causal"])
def test_encoders_with_padding(norm_first, mask):
    layer = nn.TransformerEncoderLayer(E, H, 20, batch_first=True, norm_first=norm_first, dtype=torch.float64)
    plain = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    ours = copy.deepcopy(plain)
    assert len(make_prunable(ours)) == 2
    x, padding = torch.randn(N, S, E).double(), padding_of("bool")
    hidden = torch.ones(S, S, dtype=torch.bool).triu(1) if mask == "causal" else None
    seen = (~padding)[..., None]  # torch's fused path leaves zeros at padding, others what they compute there
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            expected = plain(x, mask=hidden, src_key_padding_mask=padding)
            found = ours(x, mask=hidden, src_key_padding_mask=padding)
        torch.testing.assert_close(found * seen, expected * seen, rtol=1e-12, atol=1e-12)
        single = [network.layers[0](x, src_key_padding_mask=padding) for network in (plain, ours)]
        torch.testing.assert_close(single[1] * seen, single[0] * seen, rtol=1e-12, atol=1e-12)


def test_decoders():
    layer = nn.TransformerDecoderLayer(E, H, 20, batch_first=True, dtype=torch.float64)
    plain = nn.TransformerDecoder(layer, 2).eval()
    ours = copy.deepcopy(plain)
    assert len(make_prunable(ours)) == 4
    target, memory = torch.randn(N, T, E).double(), torch.randn(N, S, E).double()
    causal = nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64)
    options = {"tgt_mask": causal, "tgt_is_causal": True, "memory_key_padding_mask": padding_of("float")}
    torch.testing.assert_close(
        ours(target, memory, **options), plain(target, memory, **options), rtol=1e-12, atol=1e-12
    )


def test_it_can_be_taken_back():
    plain, _ = layers()
    model = nn.ModuleList([copy.deepcopy(plain)])
    changed = make_prunable(model)
    assert changed == [model[0]] and make_prunable(model) == []
    undo_prunable(changed)
    assert type(model[0]) is nn.MultiheadAttention
    check(plain, model[0], *inputs({}))
    assert vars(model[0]).keys() - {"head_dim"} == vars(plain).keys() - {"head_dim"}


class Cross(nn.Module):
    """Attention over inputs of other widths than its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(6, 8), nn.Linear(6, 10), nn.Linear(6, 14)
        self.attention = nn.MultiheadAttention(8, 4, kdim=10, vdim=14, batch_first=True, **options)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.attention(self.query(x), torch.relu(self.key(x)), torch.relu(self.value(x)))
        return self.head(mixed)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_heads_with_keys_and_values_of_other_widths(options):
    coupling = find_coupling(Cross(**options), torch.randn(2, 5, 6))
    widths = {group.name: (group.width, group.unit) for group in coupling.groups}
    assert widths["attention"] == (4, 2)  # four heads of two channels
    assert widths["key"] == (10, 1)
    assert widths["value"] == (14, 1)
