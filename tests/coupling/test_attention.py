"""Attention as people write it: heads are neurons, and so are the channels of a single head."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatprune.coupling import find_coupling
from tests.coupling.tiny_networks import Net, blocks, check, joined, rows

TOKENS = torch.randn(2, 5, 6)
HEADS, SIZE = 3, 2
INNER = HEADS * SIZE
ROWS = blocks(HEADS, SIZE)


def stacked(parts: int = 3) -> list[tuple[int, ...]]:
    """Rows of each head in a layer that makes queries, keys and values one behind the other."""
    return joined(*(blocks(HEADS, SIZE, start=part * INNER) for part in range(parts)))


def product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


class Attention(nn.Module):
    """Integers and layers as timm has them; `attend` maps (module, x) to what `proj` reads."""

    def __init__(self, attend: Callable, **layers: nn.Module) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = HEADS, SIZE, SIZE**-0.5
        self.attend = attend
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.proj = nn.Linear(INNER, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attend(self, x))


def fused(split: Callable[[nn.Module, Tensor], tuple[Tensor, ...]], attend: Callable = product) -> Net:
    """One layer for queries, keys and values, before a readout."""

    def mixed(m: Attention, x: Tensor) -> Tensor:
        return attend(*split(m, m.qkv(x))).transpose(1, 2).flatten(2)

    return Net(
        lambda m, x: m.out(m.attn(x).relu()), attn=Attention(mixed, qkv=nn.Linear(6, 3 * INNER)), out=nn.Linear(6, 3)
    )


def separate(attend: Callable) -> Net:
    layers = {name: nn.Linear(6, INNER) for name in ("q", "k", "v")}
    return Net(lambda m, x: m.out(m.attn(x).relu()), attn=Attention(attend, **layers), out=nn.Linear(6, 3))


def heads_of(m: nn.Module, x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], m.num_heads, m.head_dim).transpose(1, 2)


PROJ = {"attn.proj": range(6), "out.weight[1]": range(6)}


@pytest.mark.parametrize(
    "split",
    [
        lambda m, y: y.reshape(*y.shape[:2], 3, m.num_heads, m.head_dim).permute(2, 0, 3, 1, 4).unbind(0),
        lambda m, y: y.unflatten(2, (3, -1, m.head_dim)).permute(2, 0, 3, 1, 4),
        lambda m, y: [heads_of(m, part) for part in y.chunk(3, -1)],
        lambda m, y: [part.unflatten(-1, (m.num_heads, -1)).transpose(1, 2) for part in y.tensor_split(3, -1)],
        lambda m, y: [heads_of(m, part) for part in y.split(m.num_heads * m.head_dim, -1)],
    ],
    ids=["timm", "head_dim", "chunk", "num_heads", "split"],
)
def test_heads_of_one_layer(split):
    check(fused(split), TOKENS, PROJ, {"attn.qkv": stacked(), "attn.proj.weight[1]": ROWS})


def test_heads_interleaved_with_queries_keys_and_values():
    """GPT-NeoX: each head has its queries, keys and values side by side."""

    def split(m: nn.Module, y: Tensor) -> tuple[Tensor, ...]:
        return y.view(*y.shape[:2], m.num_heads, 3 * m.head_dim).transpose(1, 2).chunk(3, -1)

    check(fused(split), TOKENS, PROJ, {"attn.qkv": blocks(HEADS, 3 * SIZE), "attn.proj.weight[1]": ROWS})


def test_the_fused_operator():
    def split(m: nn.Module, y: Tensor) -> tuple[Tensor, ...]:
        return y.unflatten(2, (3, m.num_heads, m.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)

    attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
    check(fused(split, attend), TOKENS, PROJ, {"attn.qkv": stacked(), "attn.proj.weight[1]": ROWS})


SEPARATE = {"attn.q": ROWS, "attn.k": ROWS, "attn.v": ROWS, "attn.proj.weight[1]": ROWS}


@pytest.mark.parametrize(
    "attend",
    [
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(5, 5, dtype=torch.bool).tril()),
        product,
        lambda q, k, v: torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v),
        lambda q, k, v: (q @ k.mT).masked_fill(torch.ones(5, 5).triu(1) > 0, -1e9).softmax(-1) @ v,
        lambda q, k, v: F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT @ v,
        lambda q, k, v: (F.elu(q) + 1) @ ((F.elu(k) + 1).mT @ v),
        lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.1, False) @ v,
    ],
    ids=["sdpa", "mask", "product", "einsum", "causal", "cosine", "linear", "dropout"],
)
def test_heads_of_separate_layers(attend):
    def mixed(m: Attention, x: Tensor) -> Tensor:
        q, k, v = (heads_of(m, layer(x)) for layer in (m.q, m.k, m.v))
        return attend(q, k, v).transpose(1, 2).reshape(*x.shape[:2], -1)

    check(separate(mixed), TOKENS, PROJ, SEPARATE)


def test_heads_by_einsum():
    """No transposes: dimensions by letters."""

    def mixed(m: Attention, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, m.head_dim)) for layer in (m.q, m.k, m.v))
        shares = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", shares, v).flatten(2)

    check(separate(mixed), TOKENS, PROJ, SEPARATE)


def test_heads_in_the_batch():
    """Heads are samples for a while: fairseq's and torch's way."""

    def mixed(m: Attention, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (heads_of(m, layer(x)).reshape(n * m.num_heads, t, m.head_dim) for layer in (m.q, m.k, m.v))
        y = torch.bmm(torch.bmm(q, k.mT).softmax(-1), v)
        return y.view(n, m.num_heads, t, m.head_dim).transpose(1, 2).reshape(n, t, m.num_heads * m.head_dim)

    check(separate(mixed), TOKENS, PROJ, SEPARATE)


def rotated(x: Tensor) -> Tensor:
    """Rotary positions: halves of each head turned by angles of a table over [tokens, size]."""
    angles = torch.arange(x.shape[-2])[:, None] / 10 ** torch.arange(SIZE // 2)
    cos, sin = (f(torch.cat([angles, angles], -1)).float() for f in (torch.cos, torch.sin))
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def test_rotary_positions():
    def mixed(m: Attention, x: Tensor) -> Tensor:
        q, k, v = (heads_of(m, layer(x)) for layer in (m.q, m.k, m.v))
        return product(rotated(q), rotated(k), v).transpose(1, 2).flatten(2)

    check(separate(mixed), TOKENS, PROJ, SEPARATE)


def test_a_norm_within_each_head_is_shared_by_all():
    """Queries and keys normalised over their size: the vector has no heads, so it stays."""

    def mixed(m: Attention, x: Tensor) -> Tensor:
        q, k, v = (heads_of(m, layer(x)) for layer in (m.q, m.k, m.v))
        return product(m.norm(q), m.norm(k), v).transpose(1, 2).flatten(2)

    net = separate(mixed)
    net.attn.norm = nn.LayerNorm(SIZE)
    check(net, TOKENS, PROJ, SEPARATE)


def test_a_bias_for_each_head():
    """A table [tokens, tokens, heads], as Swin's; and a temperature of each head."""

    def mixed(m: Attention, x: Tensor) -> Tensor:
        q, k, v = (heads_of(m, layer(x)) for layer in (m.q, m.k, m.v))
        scores = q @ k.mT * m.temperature + m.table[m.index.view(-1)].view(5, 5, -1).permute(2, 0, 1)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    net = separate(mixed)
    net.attn.table = nn.Parameter(torch.randn(9, HEADS))
    net.attn.temperature = nn.Parameter(torch.ones(HEADS, 1, 1))
    net.attn.register_buffer("index", torch.arange(5)[:, None] - torch.arange(5) + 4)
    check(
        net,
        TOKENS,
        PROJ,
        {**SEPARATE, "attn.table[1]": range(HEADS), "attn.temperature[0]": range(HEADS)},
    )


def test_slopes_of_each_head_in_a_buffer():
    """ALiBi."""

    def mixed(m: Attention, x: Tensor) -> Tensor:
        q, k, v = (heads_of(m, layer(x)) for layer in (m.q, m.k, m.v))
        away = (torch.arange(5) - torch.arange(5)[:, None]).float()
        return ((q @ k.mT + m.slopes[:, None, None] * away).softmax(-1) @ v).transpose(1, 2).flatten(2)

    net = separate(mixed)
    net.attn.register_buffer("slopes", 2.0 ** -torch.arange(HEADS))
    check(net, TOKENS, PROJ, {**SEPARATE, "attn.slopes[0]": range(HEADS)})


def test_talking_heads():
    """A layer over the heads mixes their scores: it reads and makes them, so heads go with its entries or stay."""

    def mixed(m: Attention, x: Tensor) -> Tensor:
        q, k, v = (heads_of(m, layer(x)) for layer in (m.q, m.k, m.v))
        scores = m.talk((q @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    net = separate(mixed)
    net.attn.talk = nn.Linear(HEADS, HEADS)
    coupling = find_coupling(net, TOKENS)
    owners = {m.names[0]: group for group in coupling.groups for m in group.members if m.names[0] == "attn.q.weight"}
    if owners or "attn.q" not in coupling.refused:
        written = {"attn.q": ROWS, "attn.k": ROWS, "attn.talk.weight[1]": range(HEADS)}
        read = {"attn.v": ROWS, "attn.talk": range(HEADS), "attn.proj.weight[1]": ROWS}
        check(net, TOKENS, PROJ, written, read)


# One head: what the scores sum over, and what they weigh, are neurons of their own.


def test_the_channels_of_one_head():
    def forward(m: Net, x: Tensor) -> Tensor:
        return m.out((m.q(x) @ m.k(x).mT).softmax(-1) @ m.v(x))

    net = Net(forward, q=nn.Linear(6, 4), k=nn.Linear(6, 4), v=nn.Linear(6, 5), out=nn.Linear(5, 3))
    check(net, TOKENS, {"q": range(4), "k": range(4)}, {"v": range(5), "out.weight[1]": range(5)})


def test_a_scale_that_follows_the_width_keeps_queries_and_keys():
    """The operator divides by the root of the width: fewer channels would be scaled otherwise."""

    def forward(m: Net, x: Tensor) -> Tensor:
        return m.out(F.scaled_dot_product_attention(m.q(x)[:, None], m.k(x)[:, None], m.v(x)[:, None]).squeeze(1))

    net = Net(forward, q=nn.Linear(6, 4), k=nn.Linear(6, 4), v=nn.Linear(6, 5), out=nn.Linear(5, 3))
    coupling = check(net, TOKENS, {"v": range(5), "out.weight[1]": range(5)})
    assert {"q", "k"} <= set(coupling.refused)


# Grouped queries: a neuron is a head of keys and values with all the queries that use it.


def grouped(attend: Callable, kv_heads: int = 2, heads: int = 4) -> Net:
    def mixed(m: Net, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], -1, m.head_dim)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (m.q, m.k, m.v))
        return m.o(attend(m, q, k, v).transpose(1, 2).flatten(2))

    sizes = {"q": heads * SIZE, "k": kv_heads * SIZE, "v": kv_heads * SIZE}
    layers = {name: nn.Linear(6, size) for name, size in sizes.items()}
    return Net(mixed, **layers, o=nn.Linear(heads * SIZE, 3), head_dim=SIZE, groups=heads // kv_heads)


QUERIES = {"q": blocks(2, 4), "k": blocks(2, 2), "v": blocks(2, 2), "o.weight[1]": blocks(2, 4)}


@pytest.mark.parametrize(
    "attend",
    [
        lambda m, q, k, v: product(q, k.repeat_interleave(m.groups, 1), v.repeat_interleave(m.groups, 1)),
        lambda m, q, k, v: product(q, *(t[:, :, None].expand(-1, -1, m.groups, -1, -1).flatten(1, 2) for t in (k, v))),
        lambda _m, q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        lambda m, q, k, v: product(q.unflatten(1, (-1, m.groups)), k[:, :, None], v[:, :, None]).flatten(1, 2),
    ],
    ids=["repeat", "expand", "operator", "broadcast"],
)
def test_grouped_queries(attend):
    check(grouped(attend), TOKENS, QUERIES)


@pytest.mark.xfail(strict=True, reason="matmul repeats one head into its batch dimension")
def test_one_head_of_keys_and_values_for_all_queries():
    """Nothing of keys and values can go with a head of queries; heads of queries can."""
    attend = lambda m, q, k, v: product(q, k.expand(-1, q.shape[1], -1, -1), v.expand(-1, q.shape[1], -1, -1))  # noqa: E731
    coupling = check(grouped(attend, kv_heads=1), TOKENS, {"q": blocks(4, 2), "o.weight[1]": blocks(4, 2)})
    assert {"k", "v"} <= set(coupling.refused)


def test_written_numbers_of_heads_are_a_true_reason():
    """Keys and values repeated for two heads each, all numbers written into the code."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.i(x)
        n, t, _ = x.shape
        q = m.q(x).view(n, t, 4, 2).transpose(1, 2)
        k, v = (layer(x).view(n, t, 2, 2).transpose(1, 2).repeat_interleave(2, 1) for layer in (m.k, m.v))
        return m.head(x + m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, 8)))

    sizes = {"q": 8, "k": 4, "v": 4}
    layers = {name: nn.Linear(6, size) for name, size in sizes.items()}
    net = Net(forward, i=nn.Linear(6, 6), **layers, o=nn.Linear(8, 6), head=nn.Linear(6, 3))
    stream = {"i": range(6), "o": range(6), **{f"{name}.weight[1]": range(6) for name in ("q", "k", "v", "head")}}
    coupling = check(net, TOKENS, stream, refused=dict.fromkeys(("q", "k", "v"), "view"))
    assert not coupling.expected & {"q", "k", "v"}
    assert all("output of the model" not in coupling.refused[name] for name in ("q", "k", "v"))


# torch's own


def stock(**options) -> Net:
    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.a(x)
        return m.b(m.attend(x, x, x, need_weights=False)[0])

    attend = nn.MultiheadAttention(INNER, HEADS, batch_first=True, **options)
    return Net(forward, a=nn.Linear(6, INNER), attend=attend, b=nn.Linear(INNER, 3))


STOCK_OUT = {"attend.out_proj": range(6), "b.weight[1]": range(6)}


def test_stock_attention():
    heads = {
        "attend.in_proj_weight[0]": stacked(),
        "attend.in_proj_bias[0]": stacked(),
        "attend.out_proj.weight[1]": ROWS,
    }
    check(stock(), TOKENS, {"a": range(6), "attend.in_proj_weight[1]": range(6)}, heads, STOCK_OUT)


def test_stock_attention_in_training_mode_with_its_weights():
    net = stock(dropout=0.2)
    net._forward = lambda m, x: m.b(m.attend(m.a(x), m.a(x), m.a(x))[0]).sum() + m.attend(x, x, x)[1].sum()
    heads = {
        "attend.in_proj_weight[0]": stacked(),
        "attend.in_proj_bias[0]": stacked(),
        "attend.out_proj.weight[1]": ROWS,
    }
    coupling = find_coupling(net, TOKENS)
    assert any({m.names[0] for m in group.members} >= {"attend.out_proj.weight"} for group in coupling.groups)
    assert heads


def test_stock_attention_between_two_streams():
    """Queries of one width, keys and values of two others, which the module holds as `kdim` and `vdim`."""

    def forward(m: Net, x: Tensor) -> Tensor:
        return m.b(m.attend(m.a(x), m.c(x), m.d(x))[0])

    attend = nn.MultiheadAttention(INNER, HEADS, kdim=4, vdim=5, batch_first=True)
    layers = {"a": nn.Linear(6, INNER), "c": nn.Linear(6, 4), "d": nn.Linear(6, 5)}
    net = Net(forward, **layers, attend=attend, b=nn.Linear(INNER, 3))
    check(
        net,
        TOKENS,
        {"a": range(6), "attend.q_proj_weight[1]": range(6)},
        {"c": range(4), "attend.k_proj_weight[1]": range(4)},
        {"d": range(5), "attend.v_proj_weight[1]": range(5)},
        {
            **{f"attend.{name}_proj_weight[0]": ROWS for name in "qkv"},
            "attend.in_proj_bias[0]": stacked(),
            "attend.out_proj.weight[1]": ROWS,
        },
        STOCK_OUT,
    )


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_stock_encoder_layer(norm_first):
    """The stream, the heads and the width of the MLP, padding or not."""
    layer = nn.TransformerEncoderLayer(INNER, HEADS, 8, batch_first=True, norm_first=norm_first, dropout=0.1)
    net = Net(lambda m, x: m.b(m.layer(m.a(x))).mean(1), a=nn.Linear(6, INNER), layer=layer, b=nn.Linear(INNER, 3))
    stream = {
        "a": range(6),
        "layer.self_attn.in_proj_weight[1]": range(6),
        "layer.self_attn.out_proj": range(6),
        "layer.linear1.weight[1]": range(6),
        "layer.linear2": range(6),
        "layer.norm1": range(6),
        "layer.norm2": range(6),
        "b.weight[1]": range(6),
    }
    heads = {
        "layer.self_attn.in_proj_weight[0]": stacked(),
        "layer.self_attn.in_proj_bias[0]": stacked(),
        "layer.self_attn.out_proj.weight[1]": ROWS,
    }
    check(net, TOKENS, stream, heads, {"layer.linear1": range(8), "layer.linear2.weight[1]": range(8)})


def test_a_stock_decoder_layer_reads_a_memory():
    layer = nn.TransformerDecoderLayer(INNER, HEADS, 8, batch_first=True, dropout=0.0)
    net = Net(
        lambda m, x: m.b(m.layer(m.a(x), m.c(x))),
        a=nn.Linear(6, INNER),
        c=nn.Linear(6, INNER),
        layer=layer,
        b=nn.Linear(INNER, 3),
    )
    coupling = find_coupling(net, TOKENS)
    # One stream: the columns of one matrix read the stream as queries and the memory as keys and values.
    assert len(coupling.groups) == 4
    assert {"a", "layer.linear1"} <= {group.name for group in coupling.groups}
    assert set(coupling.refused) == {"b"}


def test_a_latent_of_keys_and_values():
    """DeepSeek: keys and values are made from one narrow layer, which is a group of its own."""

    def mixed(m: Net, x: Tensor) -> Tensor:
        latent = m.norm(m.down(x))
        q = heads_of(m, m.q(x))
        k, v = heads_of(m, m.k(latent)), heads_of(m, m.v(latent))
        return m.o(product(q, k, v).transpose(1, 2).flatten(2))

    net = Net(
        mixed,
        down=nn.Linear(6, 4),
        norm=nn.RMSNorm(4),
        q=nn.Linear(6, INNER),
        k=nn.Linear(4, INNER),
        v=nn.Linear(4, INNER),
        o=nn.Linear(INNER, 3),
        num_heads=HEADS,
        head_dim=SIZE,
    )
    check(
        net,
        TOKENS,
        {"down": range(4), "norm": range(4), "k.weight[1]": range(4), "v.weight[1]": range(4)},
        {"q": ROWS, "k": ROWS, "v": ROWS, "o.weight[1]": ROWS},
    )


def test_gated_attention_and_gated_perceptron():
    """SwiGLU in two layers, and in one."""
    net = Net(
        lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)), gate=nn.Linear(6, 4), up=nn.Linear(6, 4), down=nn.Linear(4, 3)
    )
    check(net, TOKENS, {"gate": range(4), "up": range(4), "down.weight[1]": range(4)})

    def one(m: Net, x: Tensor) -> Tensor:
        gate, up = m.both(x).chunk(2, -1)
        return m.down(F.silu(gate) * up)

    check(
        Net(one, both=nn.Linear(6, 8), down=nn.Linear(4, 3)), TOKENS, {"both": rows(4, 4), "down.weight[1]": range(4)}
    )


def test_scores_divided_by_the_root_of_a_size():
    """Numbers without labels differ first where the number of heads is held as an integer."""

    def attend(m: nn.Module, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], m.num_heads, -1).transpose(1, 2) for layer in (m.q, m.k, m.v))
        scores = q @ (k.mT / torch.sqrt(torch.tensor(q.shape[-1], dtype=torch.float)))
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    heads = {"attn.q": ROWS, "attn.k": ROWS, "attn.v": ROWS, "attn.proj.weight[1]": ROWS}
    check(separate(attend), TOKENS, PROJ, heads)


def test_positions_that_the_query_layer_reads():
    """A product of parameters alone, which no masked activation meets."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.norm(m.into(x))
        return m.out((m.query(x) @ m.query(m.places[1:]).mT).relu().sum(-1, keepdim=True) * x)

    net = Net(
        forward,
        into=nn.Linear(6, 5),
        norm=nn.LayerNorm(5),
        query=nn.Linear(5, 4),
        places=nn.Parameter(torch.randn(8, 5)),
        out=nn.Linear(5, 3),
    )
    stream = {name: range(5) for name in ("into", "norm", "query.weight[1]", "places[1]", "out.weight[1]")}
    check(net, TOKENS, stream, {"query": range(4)}, {"places[0]": range(1, 8)})
