"""Learning rates of a training that prunes: they know when the last neurons go."""

from __future__ import annotations

import math

import torch
from torch.optim.lr_scheduler import LRScheduler

SECOND_PEAKS = {"restart": 1.0, "finetune": 0.1}  # of the learning rate, in training after one-shot pruning
LR_SCHEDULES = ("flat_cosine", "cosine", *SECOND_PEAKS)


def rate_factor(schedule: str, step: int, total_steps: int, prune_end: float, warmup: float = 0.0) -> float:
    """What the learning rate of step 0 .. total_steps - 1 is of its peak.

    In the first part `warmup` of the steps it rises linearly (Goyal et al. 2017, arXiv 1706.02677): what follows is
    multiplied by `warmup_factor`.

    "flat_cosine": 1 until pruning ends, then (1 + cos(pi t)) / 2, t from 0 to 1. "cosine": t over all steps. "restart"
    (Renda, Frankle & Carbin 2020, arXiv 2003.02389) and "finetune": that cosine until pruning ends, and another after
    it, from 1 or from 1/10.

    Example:
        >>> [rate_factor("flat_cosine", step, 100, 0.4) for step in (0, 40, 70)]
        [1.0, 1.0, 0.5]
    """
    return warmup_factor(step, total_steps, warmup) * _after_warmup(schedule, step, total_steps, prune_end)


def warmup_factor(step: int, total_steps: int, warmup: float) -> float:
    """(step + 1) / (warmup total_steps) as long as that is below 1."""
    return min(1.0, (step + 1) / max(warmup * total_steps, 1.0))


def _after_warmup(schedule: str, step: int, total_steps: int, prune_end: float) -> float:
    start = 0.0 if schedule == "cosine" else prune_end * total_steps
    if step >= start:
        return SECOND_PEAKS.get(schedule, 1.0) * _half_cosine((step - start) / (total_steps - start))
    return 1.0 if schedule == "flat_cosine" else _half_cosine(step / start)


def _half_cosine(part: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * part))


def growth_factor(left: float, growth: float) -> float:
    """left^-growth: how much larger the learning rate is of a network of which this fraction of the parameters is left.

    Steps of Adam do not shrink with the gradient, and what they add to a layer's outputs grows with its width: the rate
    that it bears is proportional to 1 / width (Yang et al. 2022, arXiv 2203.03466), about the root of the parameters,
    growth 0.5. SGD has none.

    Example:
        >>> growth_factor(0.25, 0.5)
        2.0
    """
    return left**-growth


class PruningLR(LRScheduler):
    """The learning rates of `rate_factor`, times those that the optimizer has; `step()` after each of its steps.

    Args:
        optimizer: of the network.
        total_steps: its steps in the whole training; beyond them the last rate stays.
        schedule: one of `LR_SCHEDULES`.
        prune_end: fraction of the training at which the last neurons go, as in `CubicSchedule`.
        warmup: fraction of the training in which the rate rises linearly; transformers want 0.05 or more.
        growth: exponent of `growth_factor`, for the parameters that the optimizer has; Adam wants 0.5.
        last_epoch: steps taken already, as PyTorch has it.

    Raises:
        ValueError: naming the argument out of range.

    Example:
        >>> scheduler = flatprune.PruningLR(optimizer, total_steps=1000)
        >>> optimizer.step(); scheduler.step()
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        schedule: str = "flat_cosine",
        *,
        prune_end: float = 0.4,
        warmup: float = 0.0,
        growth: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        if schedule not in LR_SCHEDULES:
            raise ValueError(f"PruningLR: schedule is {schedule!r}, expected one of {', '.join(LR_SCHEDULES)}")
        if total_steps < 1:
            raise ValueError(f"PruningLR: total_steps is {total_steps}, expected 1 or more")
        ranges = (("prune_end", prune_end, "< 1"), ("warmup", warmup, "< 1"), ("growth", growth, "<= 1"))
        for name, value, end in ranges:
            if not isinstance(value, (int, float)) or not 0 <= value <= 1 or (value == 1 and end == "< 1"):
                raise ValueError(f"PruningLR: {name} is {value!r}, expected 0 <= {name} {end}")
        self.total_steps, self.schedule, self.prune_end, self.warmup = total_steps, schedule, prune_end, warmup
        self.growth, self.parameters_start = growth, _parameter_count(optimizer) if growth else 0
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """The rate of each group of the optimizer for the next step."""
        step = min(self.last_epoch, self.total_steps - 1)
        factor = rate_factor(self.schedule, step, self.total_steps, self.prune_end, self.warmup)
        if self.growth:
            factor *= growth_factor(_parameter_count(self.optimizer) / self.parameters_start, self.growth)
        return [float(base) * factor for base in self.base_lrs]


def _parameter_count(optimizer: torch.optim.Optimizer) -> int:
    return sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
