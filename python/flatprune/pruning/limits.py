"""How much may go at an event: widths, fractions of a group, and what the loss is predicted to rise by."""

from __future__ import annotations

import math
from typing import NamedTuple

from flatprune.coupling import NeuronGroup
from flatprune.criteria import Criterion


class Limits(NamedTuple):
    """What a removal must respect; several groups are such as keep one width, see `flatprune.pruning.ties`.

    Attributes:
        round_to: widths, in channels, become multiples of this.
        min_width: channels that stay in a group at least (of an attention: one head or more of that many together).
        max_fraction: largest fraction of a group that goes at once.
    """

    round_to: int = 1
    min_width: int = 2
    max_fraction: float = 0.5

    def step(self, *groups: NeuronGroup) -> int:
        """Neurons that go together: a multiple of the rounding, of slices that lose alike, and of what kernels take."""
        roundings = (self.round_to // math.gcd(self.round_to, group.unit) for group in groups)
        return math.lcm(*roundings, *(math.lcm(group.groups, group.multiple) for group in groups))

    def floor(self, *groups: NeuronGroup) -> int:
        """The smallest width."""
        step, least = self.step(*groups), -(-max(self.min_width, 1) // min(group.unit for group in groups))
        return min(groups[0].width, step * -(-least // step))

    def bundles(self, *groups: NeuronGroup) -> list[int]:
        """Sizes of the bundles that may go at once, the first one bringing the width to a multiple of the step."""
        step, width = self.step(*groups), groups[0].width
        removable = min(width - self.floor(*groups), int(self.max_fraction * width + 1e-9))
        first = width % step or step
        if removable < first:
            return []
        return [first] + [step] * ((removable - first) // step)


def checked_limits(round_to: int, min_width: int, max_layer_fraction: float) -> Limits:
    """The limits of a pruner; raises ValueError for the first argument out of range."""
    for name, value in (("round_to", round_to), ("min_width", min_width)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"Pruner: {name} is {value!r}, expected an integer of 1 or more")
    if not 0.0 < max_layer_fraction <= 1.0:
        raise ValueError(f"Pruner: max_layer_fraction is {max_layer_fraction}, expected above 0 and at most 1")
    return Limits(round_to, min_width, max_layer_fraction)


class LossBudget:
    """How much the loss may rise at one event, by the scores' prediction.

    Args:
        limit: sum of the predicted changes that is allowed, or None for any.
        calibration: what predictions are multiplied by, see `flatprune.pruning.predicted_vs_measured.calibration`.

    Attributes:
        spent: predicted changes of what has been removed so far, calibrated.
        exceeded: whether a neuron had to stay for it.
    """

    def __init__(self, limit: float | None = None, calibration: float = 1.0) -> None:
        self.limit, self.calibration = limit, calibration
        self.spent = 0.0
        self.exceeded = False

    def allows(self, change: float) -> bool:
        """Whether a predicted `change` may be added to what is spent; a refusal is noted."""
        if self.limit is None or self.spent + self.calibration * change <= self.limit:
            return True
        self.exceeded = True
        return False

    def charge(self, change: float) -> None:
        """Add a predicted change to what is spent."""
        self.spent += self.calibration * change


def check_loss_budget(limit: float | None, criterion: Criterion) -> None:
    """Raise ValueError for a limit that is no positive number, or that the criterion knows nothing about."""
    if limit is None:
        return
    if not 0.0 < limit < float("inf"):
        raise ValueError(f"Pruner: max_predicted_loss is {limit}, expected a number above 0, or None")
    if not criterion.predicts_loss:
        raise ValueError(f"Pruner: max_predicted_loss is {limit:g}, but criterion {criterion.name!r} predicts no loss")
