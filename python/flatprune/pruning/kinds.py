"""Heads, residual streams and perceptrons of a transformer keep their proportions, more or less, while neurons go.

What a score predicts is the change of the loss as the network is now. Early in training the perceptrons of a
transformer do little yet: ranked with the heads by that alone, nearly all of their neurons go, and with them what the
network could have learned (docs/results.md, 7). Scores of a kind are therefore multiplied by

    (its neurons at the start / those that are left)^keep_proportions

Layers of one kind compete by their scores as they are; so do all layers of a network without attention.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from flatprune.coupling import CONSUMER, PRODUCER, NeuronGroup

HEADS, STREAM, REST = "heads", "stream", "rest"
KEEP_PROPORTIONS = 2.0  # 0 and 60 lose by it in one of two transformers
_MOST = 600.0  # of a factor's logarithm, so that products are finite


class Kind(NamedTuple):
    """Of a group of neurons.

    Attributes:
        name: "heads" of an attention, "stream" for the channels that these read, or "rest": perceptrons, convolutions.
        width: its neurons at the start.
    """

    name: str
    width: int


def find_kinds(groups: Sequence[NeuronGroup]) -> dict[str, Kind]:
    """Group name -> its kind; in a network without attention all are "rest".

    Example:
        >>> {name: kind.name for name, kind in find_kinds(find_coupling(vit, images).groups).items()}
        {'patches': 'stream', 'blocks.0.attention.qkv': 'heads', 'blocks.0.mlp.0': 'rest'}
    """
    makers = {name for group in groups if group.heads for member in group.of_role(PRODUCER) for name in member.names}
    kinds = {}
    for group in groups:
        read = {name for member in group.of_role(CONSUMER) for name in member.names}
        kind = HEADS if group.heads else STREAM if read & makers else REST
        kinds[group.name] = Kind(kind, group.width)
    return kinds


class Proportions:
    """What the scores of each kind are multiplied by.

    Args:
        groups: the groups that may lose neurons.
        kinds: group name -> its kind.
        widths: group name -> neurons left, of all groups that `kinds` has.
        exponent: 0 for scores as they are.

    Attributes:
        of: the kind of each group; all of one where there is nothing to be kept.
    """

    def __init__(
        self, groups: Sequence[NeuronGroup], kinds: Mapping[str, Kind], widths: Mapping[str, int], exponent: float
    ) -> None:
        kept = exponent > 0.0 and len({kind.name for kind in kinds.values()}) > 1
        self.of = [kinds[group.name].name if kept else REST for group in groups]
        self._exponent = exponent if kept else 0.0
        self._start, self._left = dict.fromkeys(self.of, 0), dict.fromkeys(self.of, 0)
        for name, kind in kinds.items():
            if kind.name in self._start:
                self._start[kind.name] += kind.width
                self._left[kind.name] += widths[name]

    def factor(self, kind: str) -> float:
        """What scores of a kind are multiplied by now."""
        shrunk = self._start[kind] / max(self._left[kind], 1)
        return math.exp(min(_MOST, self._exponent * math.log(shrunk))) if self._exponent else 1.0

    def remove(self, positions: Sequence[int], size: int) -> None:
        """So many neurons of each of these groups go."""
        for position in positions:
            self._left[self.of[position]] -= size


def one_kind(groups: Sequence[NeuronGroup]) -> Proportions:
    """Scores as they are."""
    widths = {group.name: group.width for group in groups}
    return Proportions(groups, {name: Kind(REST, width) for name, width in widths.items()}, widths, 0.0)
