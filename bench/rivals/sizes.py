"""What a network is to weigh at the end, and knobs of rivals that make it so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn

from flatprune.models import multiply_accumulates, parameter_count

T = TypeVar("T", int, float)


@dataclass(frozen=True)
class Goal:
    """The size to end with.

    Attributes:
        unit: "params" or "macs" (of one sample).
        fraction: of what the whole network has.
        example: inputs of the network, [n, channels, height, width].
    """

    unit: str
    fraction: float
    example: Tensor

    def cost(self, model: nn.Module) -> int:
        """What a network has of the unit."""
        if self.unit == "params":
            return parameter_count(model)
        return multiply_accumulates(model, self.example[:1])


def bisected(cost: Callable[[T], float], low: T, high: T, target: float, steps: int = 24) -> T:
    """The knob whose cost is closest to `target`, found by bisection without training.

    Args:
        cost: of the network that a copy becomes with this knob; falls as the knob grows, up to jumps.
        low, high: the least and the largest knob; integers are bisected as such.
        target: the cost wanted.
        steps: evaluations at most, besides those of the ends.

    Returns:
        The best of all that were tried.
    """
    tried = {knob: cost(knob) for knob in (low, high)}
    for _ in range(steps):
        middle = (low + high) // 2 if isinstance(low, int) and isinstance(high, int) else (low + high) / 2
        if middle in tried:
            break
        tried[middle] = cost(middle)
        low, high = (middle, high) if tried[middle] > target else (low, middle)
    return min(tried, key=lambda knob: abs(tried[knob] - target))
