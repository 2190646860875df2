"""Who is cut in which round of a trial.

A random part of every group (as many from each slice), then what stayed, then one neuron of each, then some groups
while others stay whole, so that each two are told apart once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flatprune.coupling.components import Candidate
from flatprune.coupling.neurons import Attribute, NeuronGroup

Round = str | int  # HALF, REST, ONE, or the bit of a candidate's position without which it stays whole
HALF, REST, ONE = "half", "rest", "one"


def rounds(positions: Sequence[int]) -> list[Round]:
    """All rounds that prove the candidates at these positions."""
    return [HALF, REST, ONE, *range(max(positions, default=0).bit_length())]


@dataclass
class Plan:
    """One attempt: which neurons go, and everything that follows.

    Attributes:
        chosen: positions of candidates.
        pruned: position -> neurons.
        attributes: position -> integers found so far.
    """

    chosen: list[int]
    pruned: dict[int, Tensor]
    attributes: dict[int, list[Attribute]] = field(default_factory=dict)


def pruned(candidates: Sequence[Candidate], chosen: Sequence[int], how: Round) -> dict[int, Tensor]:
    """Position -> neurons of each chosen candidate that go in a round."""
    return {position: _neurons(candidates[position].group, position, how) for position in chosen}


def _neurons(group: NeuronGroup, position: int, how: Round) -> Tensor:
    """Random neurons of a candidate, as many of each slice; none if bit `how` of its position is not set."""
    generator = torch.Generator().manual_seed(position)
    own = group.width // group.groups
    step = group.multiple // math.gcd(group.multiple, group.groups)  # of each slice
    least = own % step or step
    most = max(least, own // 2 - position % max(1, own // 4) * step)  # different numbers tell groups apart
    count = least if how == ONE else least + (most - least) // step * step
    if count >= own or (isinstance(how, int) and not position >> how & 1):
        return torch.empty(0, dtype=torch.int64)
    parts = [(group.group_of == part).nonzero().flatten() for part in range(group.groups)]
    orders = [torch.randperm(own, generator=generator) for _ in parts]
    if how == REST:  # so that every neuron goes once, in another number for each candidate
        fewer = max(0, min(position % 3 * step, own - count - least))
        found = [part[order[count : own - fewer]] for part, order in zip(parts, orders)]
    else:
        found = [part[order[:count]] for part, order in zip(parts, orders)]
    return torch.cat(found).sort().values
