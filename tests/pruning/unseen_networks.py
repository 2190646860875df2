"""Networks that the pruner was not written for; each with the groups that can be pruned and why others cannot."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import weight_norm
from torch.nn.utils.prune import l1_unstructured
from torch.utils.checkpoint import checkpoint

from tests.pruning.pruning_networks import Attention

relu = torch.relu


class Net(nn.Module):
    """Layers by name and a forward that is given as a function of the module and the inputs."""

    def __init__(self, forward, **layers: nn.Module) -> None:
        super().__init__()
        self._forward = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._forward(self, *inputs)


def conv(inputs: int, outputs: int, size: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def nested() -> nn.Module:
    """Residual sums within residual sums, one batch norm behind four layers, a grouped convolution, a concatenation."""

    def forward(m, x):
        x = relu(m.norm(m.stem(x)))
        y = relu(m.norm(m.grouped(x))) + x
        y = relu(m.norm(m.plain(y))) + y + x
        return m.head(pooled(relu(m.norm(m.join(torch.cat([x, y], 1)) + y))))

    layers = {"stem": conv(1, 8), "norm": nn.BatchNorm2d(8), "grouped": conv(8, 8, groups=2), "plain": conv(8, 8)}
    return Net(forward, **layers, join=conv(16, 8, 1), head=nn.Linear(8, 10))


def unet() -> nn.Module:
    """Two transposed convolutions, each joined with what was there before."""

    def forward(m, x):
        first = relu(m.norm(m.first(x)))
        second = relu(m.second(first))
        y = relu(m.third(second))
        y = relu(m.join2(torch.cat([m.up2(y), second], 1)))
        return m.out(relu(m.join1(torch.cat([first, m.up1(y)], 1)))).mean((2, 3))

    down = {"first": conv(1, 6), "norm": nn.BatchNorm2d(6), "second": conv(6, 10, stride=2)}
    up = {"up2": nn.ConvTranspose2d(12, 8, 2, stride=2), "join2": conv(18, 8), "up1": nn.ConvTranspose2d(8, 5, 2, 2)}
    return Net(forward, **down, third=conv(10, 12, stride=2), **up, join1=conv(11, 6), out=conv(6, 10, 1))


def sequence_norms() -> nn.Module:
    """Nested containers of convolutions over [N, C, L] with group norms; the outer slices cross those of `grouped`."""
    inner = nn.Sequential(nn.Conv1d(12, 8, 3, dilation=2), nn.GroupNorm(1, 8))
    grouped = nn.Sequential(nn.Conv1d(12, 12, 3, groups=3), nn.GroupNorm(3, 12), nn.ReLU(), inner)
    body = nn.Sequential(nn.Conv1d(4, 12, 3, padding=1), nn.GroupNorm(4, 12), nn.ReLU(), grouped)
    return nn.Sequential(nn.Flatten(), nn.Unflatten(1, (4, 16)), body, nn.Flatten(), nn.Linear(80, 10))


def class_token() -> nn.Module:
    """A vision transformer's block: a class token and positions are bare parameters."""

    def forward(m, x):
        x = m.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([m.token.expand(len(x), -1, -1), x], 1) + m.position
        x = x + m.attn(m.norm(x))
        return m.head((x + m.mlp(x))[:, 0])

    model = Net(forward, patch=nn.Conv2d(1, 12, 2, 2), norm=nn.LayerNorm(12), attn=Attention.Heads(12, 3, 4))
    model.token, model.position = nn.Parameter(torch.randn(1, 1, 12)), nn.Parameter(torch.randn(1, 17, 12))
    model.mlp, model.head = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12)), nn.Linear(12, 10)
    return model


def squeeze() -> nn.Module:
    """MobileNet's block: expand, depthwise, a gate from pooled channels, project, residual sum."""

    def forward(m, x):
        x = m.norm(m.stem(x))
        y = F.relu6(m.deep_norm(m.deep(F.hardswish(m.expand(x)))))
        y = y * torch.sigmoid(m.widen(relu(m.narrow(F.adaptive_avg_pool2d(y, 1)))))
        return m.head(F.adaptive_avg_pool2d(x + m.project(y), 1).flatten(1))

    layers = {"stem": conv(1, 8), "norm": nn.BatchNorm2d(8), "expand": conv(8, 16, 1), "deep": conv(16, 16, groups=16)}
    gate = {"deep_norm": nn.BatchNorm2d(16), "narrow": conv(16, 4, 1), "widen": conv(4, 16, 1)}
    return Net(forward, **layers, **gate, project=conv(16, 8, 1), head=nn.Linear(8, 10))


def called_on_two_sizes() -> nn.Module:
    def forward(m, x):
        x = F.max_pool2d(relu(m.twice(relu(m.first(x)))), 2)
        return m.head(pooled(relu(m.twice(x))))

    return Net(forward, first=conv(1, 6), twice=conv(6, 6), head=nn.Linear(6, 10))


def shared_modules() -> nn.Module:
    """One layer and one batch norm at two places of a container each."""
    shared, norm, act = nn.Linear(12, 12), nn.BatchNorm1d(12), nn.ReLU()
    body = nn.Linear(64, 12), norm, act, shared, norm, act, shared, norm, act
    return nn.Sequential(nn.Flatten(), *body, nn.Linear(12, 10))


def tied() -> nn.Module:
    """Two layers with one weight; the rest can go."""
    tied = nn.Linear(12, 12)
    tied.weight = (first := nn.Linear(12, 12)).weight
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 12), first, nn.ReLU(), tied, nn.Linear(12, 14), nn.ReLU(), nn.Linear(14, 10)
    )


def tied_by_function() -> nn.Module:
    """A weight used once more, transposed, by a function that no hook sees."""

    def forward(m, x):
        x = m.back(relu(m.middle(relu(m.encode(x.flatten(1))))))
        return m.head(relu(F.linear(x, m.encode.weight.t())))

    layers = {"encode": nn.Linear(64, 12), "middle": nn.Linear(12, 9), "back": nn.Linear(9, 12)}
    return Net(forward, **layers, head=nn.Linear(64, 10))


def through(operation, inputs: int = 12) -> nn.Module:
    """A convolution of 12 channels, `operation`, a convolution that reads `inputs` channels."""
    forward = lambda m, x: m.head(pooled(relu(m.second(operation(relu(m.first(x)))))))  # noqa: E731
    return Net(forward, first=conv(1, 12), second=conv(inputs, 9), head=nn.Linear(9, 10))


def uneven_split() -> nn.Module:
    def forward(m, x):
        small, large = torch.split(relu(m.first(x)), [4, 8], 1)
        return m.head(pooled(relu(m.small(small) + m.large(large))))

    return Net(forward, first=conv(1, 12), small=conv(4, 6, 1), large=conv(8, 6, 1), head=nn.Linear(6, 10))


def functional() -> nn.Module:
    """A convolution whose weight is used through `F.conv2d`."""

    def forward(m, x):
        x = relu(F.conv2d(relu(m.first(x)), m.hidden.weight, m.hidden.bias, padding=1))
        return m.head(pooled(relu(m.last(x))))

    return Net(forward, first=conv(1, 8), hidden=conv(8, 8), last=conv(8, 9), head=nn.Linear(9, 10))


def stock_attention() -> nn.Module:
    def forward(m, x):
        x = m.embed(x[:, 0])
        x = x + m.attend(x, x, x, need_weights=False)[0]
        return m.head((x + m.narrow(relu(m.widen(x)))).mean(1))

    layers = {"embed": nn.Linear(8, 12), "attend": nn.MultiheadAttention(12, 3, batch_first=True)}
    return Net(forward, **layers, widen=nn.Linear(12, 20), narrow=nn.Linear(20, 12), head=nn.Linear(12, 10))


def keys_and_queries() -> nn.Module:
    """Attention in layers of its own: the products of queries and keys mix their channels."""

    def forward(m, x):
        x = m.embed(x[:, 0])
        attention = (m.query(x) @ m.key(x).mT).softmax(-1)
        return m.head((x + m.out(attention @ m.value(x))).mean(1))

    layers = {"embed": nn.Linear(8, 12), "query": nn.Linear(12, 6), "key": nn.Linear(12, 6), "value": nn.Linear(12, 7)}
    return Net(forward, **layers, out=nn.Linear(7, 12), head=nn.Linear(12, 10))


def recurrent(cell: bool) -> nn.Module:
    def forward(m, x):
        rows = m.embed(x[:, 0])
        if not cell:
            return m.head(relu(m.after(m.memory(rows)[0][:, -1])))
        state = None
        for row in rows[:, :4].unbind(1):
            state = m.memory(row, state)
        return m.head(relu(m.after(state[0])))

    memory = nn.LSTMCell(12, 10) if cell else nn.LSTM(12, 10, batch_first=True)
    return Net(forward, embed=nn.Linear(8, 12), memory=memory, after=nn.Linear(10, 14), head=nn.Linear(14, 10))


def embedded() -> nn.Module:
    """Two embeddings in a residual stream."""

    def forward(m, x):
        x = m.words(x) + m.places(torch.arange(8))
        return m.head((x + m.narrow(relu(m.widen(x)))).mean(1))

    layers = {"words": nn.Embedding(20, 12), "places": nn.Embedding(8, 12)}
    return Net(forward, **layers, widen=nn.Linear(12, 20), narrow=nn.Linear(20, 12), head=nn.Linear(12, 10))


def two_inputs() -> nn.Module:
    forward = lambda m, x, y: m.head(relu(m.join(torch.cat([pooled(relu(m.left(x))), relu(m.right(y))], 1))))  # noqa: E731
    return Net(forward, left=conv(1, 8), right=nn.Linear(5, 6), join=nn.Linear(14, 12), head=nn.Linear(12, 10))


def frozen() -> nn.Module:
    """The first two layers are frozen: no gradient, and so no curvature, tells what they are worth."""
    forward = lambda m, x: m.head(relu(m.third(pooled(relu(m.second(relu(m.first(x))))))))  # noqa: E731
    model = Net(forward, first=conv(1, 8), second=conv(8, 10), third=nn.Linear(10, 12), head=nn.Linear(12, 10))
    model.first.requires_grad_(False)
    model.second.requires_grad_(False)
    return model


def dense_blocks() -> nn.Module:
    def forward(m, x):
        maps = [m.first(x)]
        maps.append(m.second(relu(m.norm1(maps[0]))))
        maps.append(m.third(relu(m.norm2(torch.cat(maps, 1)))))
        return m.head(pooled(relu(m.norm3(torch.cat(maps, 1)))))

    norms = {f"norm{i}": nn.BatchNorm2d(size) for i, size in ((1, 6), (2, 10), (3, 14))}
    return Net(forward, first=conv(1, 6), second=conv(6, 4), third=conv(10, 4), **norms, head=nn.Linear(14, 10))


def channels_last_block() -> nn.Module:
    """ConvNeXt's block: depthwise, permuted to channels last, layer norm and Linear, and back."""

    def forward(m, x):
        x = m.stem(x)
        y = m.narrow(F.gelu(m.widen(m.norm(m.deep(x).permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)
        return m.head(pooled(x + y))

    layers = {"stem": nn.Conv2d(1, 8, 2, 2), "deep": conv(8, 8, groups=8), "norm": nn.LayerNorm(8)}
    return Net(forward, **layers, widen=nn.Linear(8, 20), narrow=nn.Linear(20, 8), head=nn.Linear(8, 10))


def flattened_pool() -> nn.Module:
    """Adaptive pooling to 2 x 3 positions, which a flatten makes columns of."""
    body = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    return nn.Sequential(
        body, nn.AdaptiveAvgPool2d((2, 3)), nn.Flatten(), nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 10)
    )


def recomputed() -> nn.Module:
    def forward(m, x):
        return m.head(relu(checkpoint(m.second, relu(m.first(x.flatten(1))), use_reentrant=False)))

    return Net(forward, first=nn.Linear(64, 12), second=nn.Linear(12, 9), head=nn.Linear(9, 10))


def vector(operation) -> nn.Module:
    """A Linear of 24 outputs, `operation` on [N, 24], a Linear."""
    forward = lambda m, x: m.head(relu(m.second(operation(m.first(x.flatten(1))))))  # noqa: E731
    return Net(forward, first=nn.Linear(64, 24), second=nn.Linear(24, 10), head=nn.Linear(10, 10))


def computed_weights(wrap):
    """Weights that hooks compute of others before each forward."""
    layers = [wrap(nn.Linear(64, 40)), nn.ReLU(), wrap(nn.Linear(40, 24)), nn.ReLU(), nn.Linear(24, 10)]
    return nn.Sequential(nn.Flatten(), *layers)


class Case(NamedTuple):
    """A network to prune.

    Attributes:
        build: makes it.
        groups: names of those that can be pruned.
        refused: layer -> words of the reason why it, or some of its neurons, stay.
        inputs: what it is given, see `inputs_of`.
        criterion: one that can judge it.
        joint: a function takes statistics over the neurons, so that masked ones have to be zero where they are made.
    """

    build: object
    groups: set[str]
    refused: Mapping[str, str] = MappingProxyType({})
    inputs: str = "image"
    criterion: str = "obs"
    joint: bool = False


CASES = {
    "nested": Case(nested, {"stem"}),
    "unet": Case(unet, {"first", "second", "third", "up2", "join2", "up1", "join1"}),
    "sequence norms": Case(sequence_norms, {"2.3.0", "2.3.3.0"}, {"2.0": "into different slices"}),
    "class token": Case(class_token, {"patch", "attn.qkv", "mlp.0"}),
    "squeeze": Case(squeeze, {"stem", "expand", "narrow"}),
    "called on two sizes": Case(called_on_two_sizes, {"first"}),
    "shared modules": Case(shared_modules, {"1"}),
    "tied": Case(tied, {"1", "5"}),
    "tied by function": Case(tied_by_function, {"encode", "middle"}, {"encode": "an input or a constant"}),
    "uneven split": Case(uneven_split, {"small"}, {"first": "a trial cut fails"}),
    "pixel shuffle": Case(lambda: through(nn.PixelShuffle(2), 3), {"first", "second"}),
    "pixel unshuffle": Case(lambda: through(nn.PixelUnshuffle(2), 48), {"first", "second"}),
    "channel shuffle": Case(lambda: through(nn.ChannelShuffle(3)), {"first", "second"}),
    "roll": Case(lambda: through(lambda x: x.roll(1, 1)), {"second"}, {"first": "computes something else"}),
    "local response": Case(lambda: through(nn.LocalResponseNorm(3)), {"second"}, {"first": "mixed by avg_pool3d"}),
    "softmax": Case(lambda: vector(lambda x: x.softmax(1)), {"second"}, {"first": "mixed by _softmax"}),
    "normalize": Case(lambda: vector(lambda x: F.normalize(x, dim=1)), {"first", "second"}, joint=True),
    "written size": Case(lambda: vector(lambda x: x.view(-1, 24)), {"second"}, {"first": "a trial cut fails"}),
    "functional": Case(functional, {"first", "hidden", "last"}),
    "stock attention": Case(stock_attention, {"embed", "attend", "widen"}),
    "keys and queries": Case(keys_and_queries, {"embed", "query", "value"}, criterion="l1"),
    "lstm": Case(lambda: recurrent(False), {"embed", "memory", "after"}, criterion="l1"),
    "lstm cell": Case(lambda: recurrent(True), {"embed", "memory", "after"}, criterion="l1"),
    "embedded": Case(embedded, {"words", "widen"}, inputs="words"),
    "two inputs": Case(two_inputs, {"left", "right", "join"}, inputs="image and vector"),
    "frozen": Case(frozen, {"second", "third"}, {"first": "'second', which reads it, gets no gradient"}),
    "dense blocks": Case(dense_blocks, {"first", "second", "third"}),
    "channels last": Case(channels_last_block, {"stem", "widen"}),
    "flattened pool": Case(flattened_pool, {"0.0", "0.2.0", "3"}),
    "recomputed": Case(recomputed, {"first", "second"}),
    "weight norm": Case(lambda: computed_weights(weight_norm), {"1", "3"}, criterion="l1"),
    "masked weights": Case(
        lambda: computed_weights(lambda x: l1_unstructured(x, "weight", 0.3)), {"1", "3"}, criterion="l1"
    ),
}


def inputs_of(case: Case, count: int) -> tuple[Tensor, ...]:
    """Random inputs of a case."""
    if case.inputs == "words":
        return (torch.randint(0, 20, (count, 8)),)
    image = torch.randn(count, 1, 8, 8)
    return (image, torch.randn(count, 5)) if case.inputs == "image and vector" else (image,)
