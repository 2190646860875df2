"""What is known of a tensor beside its data: label layers, one number for each entry that may vary.

A *label* stands for an entry of a dimension of a parameter or buffer (a node of the union-find):

    n > 0   the entry goes when node n goes
    0       nothing known: it adapts
    -1      it cannot go (padding, a constant, an input)

A *layer* is an int64 tensor of the rank of the data whose dimensions are full size where its labels vary and 1 where
they do not. A weight [O, I] has two layers, its rows and its columns; an activation usually one. An entry of a tensor
goes when the node of any of its layers does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

JOINT = 1 << 40  # labels from here on: entries that a contraction left, such as the scores of one head


@dataclass
class Axis:
    """A dimension of a parameter or buffer; of a grouped convolution's inputs: all of them, group by group.

    Attributes:
        names: qualified names of the tensor.
        dim: its dimension.
        start: label of its first entry.
        size: entries, `groups` times the tensor's own size along `dim`.
        groups: of a grouped convolution, else 1.
        roles: "producer", "channelwise", "consumer", as operators use it.
    """

    names: tuple[str, ...]
    dim: int
    start: int
    size: int
    groups: int = 1
    roles: set[str] = field(default_factory=set)

    def labels(self) -> Tensor:
        """Of all entries, [size]; [groups, size / groups] for a grouped convolution."""
        labels = torch.arange(self.start, self.start + self.size)
        return labels if self.groups == 1 else labels.view(self.groups, -1)


@dataclass(frozen=True, eq=False)
class Value:
    """What is known of a tensor.

    Attributes:
        size: of the tensor.
        layers: its labels.
        free: made inside the forward (zeros, randn): its size follows that of what it meets.
        param: a parameter or buffer, moved at most.
        stats: statistics over channels (a mean, say) that nothing has used up; positions in `Findings.statistics`.
        loose: dimensions, from the end, that an expand made: their size adapts.
    """

    size: tuple[int, ...]
    layers: tuple[Tensor, ...] = ()
    free: bool = False
    param: bool = False
    stats: frozenset[int] = frozenset()
    loose: frozenset[int] = frozenset()

    @property
    def rank(self) -> int:
        """Dimensions."""
        return len(self.size)

    def having(self, **changes: Any) -> Value:
        """A copy with other attributes."""
        return replace(self, **changes)

    def shaped(self, dims: Iterable[int | None]) -> Value:
        """Dimensions in another order; None inserts one of size 1, a dimension left out must be of constant labels."""
        dims = list(dims)
        kept = [d for d in dims if d is not None]
        dropped = [d for d in range(self.rank) if d not in kept]

        def moved(layer: Tensor) -> Tensor:
            for d in reversed(dropped):
                layer = layer.select(d, 0)
            order = [sorted(kept).index(d) for d in kept]
            layer = layer.permute(order)
            sizes = iter(layer.shape)
            return layer.reshape([1 if d is None else next(sizes) for d in dims])

        size = tuple(1 if d is None else self.size[d] for d in dims)
        return self.having(size=size, layers=tuple(moved(layer) for layer in self.layers))


def varying(layer: Tensor) -> set[int]:
    """The dimensions along which labels differ."""
    return {d for d, n in enumerate(layer.shape) if n > 1}


def aligned(layer: Tensor, rank: int) -> Tensor:
    """With leading dimensions of size 1, as broadcasting adds them."""
    return layer.reshape((1,) * (rank - layer.dim()) + tuple(layer.shape))


def canonical(layer: Tensor) -> Tensor | None:
    """Size 1 wherever labels do not differ (0 counts as equal to anything); None without any label."""
    for d in range(layer.dim()):
        if layer.shape[d] > 1 and layer.stride(d) == 0:
            layer = layer.narrow(d, 0, 1)
    if layer.numel() == 0:
        return None
    for d in range(layer.dim()):
        if layer.shape[d] > 1:
            top = layer.amax(d, keepdim=True)
            if bool(((layer == top) | (layer == 0)).all()):
                layer = top
    return layer if int(layer.max()) > 0 else None


def canonical_layers(layers: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """All that have labels, see `canonical`."""
    return tuple(layer for layer in map(canonical, layers) if layer is not None)


def labels_of(layer: Tensor) -> Tensor:
    """The nodes of a layer, once each, ascending: [n]."""
    labels = layer.unique()
    return labels[labels > 0]
