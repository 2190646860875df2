"""A few samples of a batch, to show how a network is called."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

_SAMPLES = 2


def first_samples(batch: Any) -> Any:
    """The first two samples of a batch, nested as it was.

    A batch of which tensors begin with different sizes stays whole: the nodes and edges of a graph, say.
    """
    if len({len(leaf) for leaf in tree_leaves(batch) if _counts(leaf)}) > 1:
        return batch
    return tree_map(lambda leaf: leaf[:_SAMPLES] if _counts(leaf) else leaf, batch)


def _counts(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0
