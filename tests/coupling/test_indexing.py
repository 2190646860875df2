"""Look-ups, gathers and scatters: what is indexed along positions moves, what is looked up stays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.coupling.tiny_networks import Net, check

WORDS = torch.tensor([[1, 4, 2, 0], [3, 3, 5, 1]])
TOKENS = torch.randn(2, 4, 5)
PLAIN = {"a": range(6), "b.weight[1]": range(6)}


def tokens(operation, **parts) -> Net:
    """A Linear to [N, 4, 6], an operation on (module, that), a Linear to 3."""
    return Net(lambda m, x: m.b(operation(m, m.a(x))), a=nn.Linear(5, 6), b=nn.Linear(6, 3), **parts)


def test_columns_of_an_embedding_are_made_and_its_rows_stay():
    net = Net(lambda m, x: m.b(m.words(x)), words=nn.Embedding(7, 6), b=nn.Linear(6, 3))
    coupling = check(net, WORDS, {"words.weight[1]": range(6), "b.weight[1]": range(6)})
    assert coupling.groups[0].name == "words"
    assert coupling.groups[0].of_role("producer")[0].names == ("words.weight",)


def test_embeddings_that_are_added_are_one():
    """Words, places and kinds of BERT, and a norm behind them."""
    net = Net(
        lambda m, x: m.b(m.norm(m.words(x) + m.places(torch.arange(x.shape[1])) + m.kinds(torch.zeros_like(x)))),
        words=nn.Embedding(7, 6, padding_idx=0),
        places=nn.Embedding(9, 6),
        kinds=nn.Embedding(2, 6),
        norm=nn.LayerNorm(6),
        b=nn.Linear(6, 3),
    )
    names = ("words", "places", "kinds")
    check(net, WORDS, {**{f"{n}.weight[1]": range(6) for n in names}, "norm": range(6), "b.weight[1]": range(6)})


def test_a_head_tied_to_the_embedding():
    """The stream of a language model: one tensor makes it and reads it."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.words(x)
        x = x + m.narrow(F.gelu(m.wide(m.norm(x))))
        return m.head(x)

    net = Net(
        forward,
        words=nn.Embedding(7, 6),
        norm=nn.LayerNorm(6),
        wide=nn.Linear(6, 8),
        narrow=nn.Linear(8, 6),
        head=nn.Linear(6, 7, bias=False),
    )
    net.head.weight = net.words.weight
    coupling = check(
        net,
        WORDS,
        {"words.weight[1]": range(6), "norm": range(6), "wide.weight[1]": range(6), "narrow": range(6)},
        {"wide": range(8), "narrow.weight[1]": range(8)},
    )
    (tied,) = [m for m in coupling.groups[0].members if "head.weight" in m.names]
    assert set(tied.names) == {"words.weight", "head.weight"}
    assert tied.roles >= {"producer", "consumer"}


def test_a_factorised_embedding():
    net = Net(lambda m, x: m.b(F.relu(m.a(m.words(x)))), words=nn.Embedding(7, 4), a=nn.Linear(4, 6), b=nn.Linear(6, 3))
    check(net, WORDS, {"words.weight[1]": range(4), "a.weight[1]": range(4)}, PLAIN)


def test_bags_of_embeddings():
    for mode in ("sum", "mean", "max"):
        net = Net(lambda m, x: m.b(m.words(x)), words=nn.EmbeddingBag(7, 6, mode=mode), b=nn.Linear(6, 3))
        check(net, WORDS, {"words.weight[1]": range(6), "b.weight[1]": range(6)})


def test_a_parameter_that_is_indexed_is_an_embedding():
    net = Net(lambda m, x: m.b(m.table[x]), table=nn.Parameter(torch.randn(7, 6)), b=nn.Linear(6, 3))
    check(net, WORDS, {"table[1]": range(6), "b.weight[1]": range(6)})


def test_a_class_token():
    """A bare parameter joined to the tokens, one of them read."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = torch.cat([m.token.expand(len(x), -1, -1), m.a(x)], 1) + m.position
        return m.b((x + m.narrow(F.gelu(m.wide(x))))[:, 0])

    net = Net(
        forward,
        a=nn.Linear(5, 6),
        wide=nn.Linear(6, 8),
        narrow=nn.Linear(8, 6),
        b=nn.Linear(6, 3),
        token=nn.Parameter(torch.zeros(1, 1, 6)),
        position=nn.Parameter(torch.randn(1, 5, 6)),
    )
    stream = {**PLAIN, "narrow": range(6), "wide.weight[1]": range(6), "token[2]": range(6), "position[2]": range(6)}
    check(net, TOKENS, stream, {"wide": range(8), "narrow.weight[1]": range(8)})


def test_queries_that_are_parameters():
    """Perceiver, DETR: learned latents read the input; they make the stream."""

    def forward(m: Net, x: Tensor) -> Tensor:
        weights = (m.latents @ m.key(x).mT).softmax(-1)
        return m.b(m.latents + m.out(weights @ m.value(x)))

    net = Net(
        forward,
        key=nn.Linear(5, 6),
        value=nn.Linear(5, 4),
        out=nn.Linear(4, 6),
        b=nn.Linear(6, 3),
        latents=nn.Parameter(torch.randn(3, 6)),
    )
    check(
        net,
        TOKENS,
        {"key": range(6), "out": range(6), "b.weight[1]": range(6), "latents[1]": range(6)},
        {"value": range(4), "out.weight[1]": range(4)},
    )


@pytest.mark.parametrize(
    "operation",
    [
        lambda _m, x: x[:, 0],
        lambda _m, x: x[:, [2, 0, 0]],
        lambda _m, x: x[torch.tensor([1, 0])],
        lambda _m, x: x[torch.rand(2, 4) > -1],
        lambda _m, x: x[torch.arange(2), torch.tensor([3, 1])],
        lambda _m, x: x.index_select(1, torch.tensor([1, 3])),
        lambda _m, x: x.gather(1, torch.tensor([[[1]], [[2]]]).expand(-1, -1, x.shape[-1])),
        lambda _m, x: x.take_along_dim(torch.tensor([[[1]], [[2]]]), 1),
        lambda _m, x: x.narrow(1, 1, 2),
        lambda _m, x: torch.zeros(2, 5, x.shape[-1]).scatter(1, torch.zeros(2, 4, x.shape[-1], dtype=torch.long), x),
        lambda _m, x: torch.zeros(3, x.shape[-1]).index_add(0, torch.tensor([2, 0, 2, 1]), x[0]),
        lambda _m, x: torch.zeros(3, x.shape[-1]).scatter_add_(
            0, torch.tensor([2, 0, 2, 1])[:, None].expand_as(x[0]), x[0]
        ),
        lambda _m, x: torch.zeros(3, x.shape[-1]).index_put((torch.tensor([2, 0, 2, 1]),), x[0], accumulate=True),
        lambda _m, x: torch.zeros(5, x.shape[-1]).index_copy(0, torch.tensor([2, 0, 3, 1]), x[0]),
        lambda _m, x: x[:, x.detach().mean((0, 2)).argsort()],
        lambda _m, x: x.flatten(0, 1)[torch.nonzero(torch.ones(8)).squeeze(1)],
        lambda _m, x: nn.utils.rnn.pad_sequence([x[0, :2], x[1]], batch_first=True),
    ],
    ids=[
        "select",
        "list",
        "rows",
        "mask",
        "pairs",
        "index_select",
        "gather",
        "take_along_dim",
        "narrow",
        "scatter",
        "index_add",
        "scatter_add",
        "index_put",
        "index_copy",
        "argsort",
        "nonzero",
        "pad_sequence",
    ],
)
def test_positions_are_picked_and_put(operation):
    check(tokens(operation), TOKENS, PLAIN)


def test_messages_over_the_edges_of_a_graph():
    """Gather at the sources, sum at the targets, twice."""

    def spread(x: Tensor, edges: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add_(0, edges[1], x[edges[0]])

    net = Net(
        lambda m, x, edges: m.b(spread(F.relu(m.c(spread(m.a(x), edges))), edges)),
        a=nn.Linear(5, 6),
        c=nn.Linear(6, 4),
        b=nn.Linear(4, 3),
    )
    edges = torch.tensor([[0, 1, 2, 3, 0], [1, 0, 3, 2, 2]])
    check(
        net,
        (torch.randn(4, 5), edges),
        {"a": range(6), "c.weight[1]": range(6)},
        {"c": range(4), "b.weight[1]": range(4)},
    )


def test_picking_channels_by_a_list_is_refused():
    for operation in (
        lambda m, x: x[..., [0, 2, 4, 1, 3, 5]],
        lambda m, x: x[..., m.order],
        lambda m, x: x.index_select(2, m.order),
        lambda m, x: x.gather(2, m.order.expand_as(x)),
    ):
        net = tokens(operation)
        net.register_buffer("order", torch.tensor([0, 2, 4, 1, 3, 5]))
        check(net, TOKENS, refused={"a": ""})


def test_picking_channels_by_their_values_is_refused():
    check(tokens(lambda _m, x: x.sort(2).values), TOKENS, refused={"a": "sort"})
    check(
        Net(lambda m, x: m.b(m.a(x).topk(3, 2).values), a=nn.Linear(5, 6), b=nn.Linear(3, 2)),
        TOKENS,
        refused={"a": "topk"},
    )


def test_nearest_entries_of_a_codebook():
    """Vector quantisation: the distance to all codes reads the stream, the code found replaces it."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.a(x).flatten(0, 1)
        distance = x.square().sum(1, keepdim=True) - 2 * x @ m.codes.weight.t() + m.codes.weight.square().sum(1)
        return m.b(m.codes(distance.argmin(1)))

    net = Net(forward, a=nn.Linear(5, 6), codes=nn.Embedding(9, 6), b=nn.Linear(6, 3))
    check(net, TOKENS, {**PLAIN, "codes.weight[1]": range(6)})
