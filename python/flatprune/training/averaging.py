"""An exponential moving average of a model's weights, which neurons leave as they leave the model."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from flatprune.cutting.ema_models import named_tensors
from flatprune.distributed import refuse_wrapped


class AveragedWeights:
    """m <- d m + (1 - d) w after each step, of parameters and running statistics; d = min(decay, (1 + t) / (10 + t)).

    t counts steps from 0: the first weights, which say little, are soon forgotten. Counters are copied. Nothing waits
    for the device, which `torch.optim.swa_utils.AveragedModel.update_parameters` does at every step.

    Args:
        model: the network; its average begins as a copy of it.
        decay: d in the long run, in [0, 1).

    Attributes:
        module: the average; one of the `ema_models` of `flatprune.Pruner`.

    Raises:
        ValueError: decay out of range.

    Example:
        >>> average = AveragedWeights(model, 0.99)
        >>> optimizer.step(); average.update(model, step)
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"AveragedWeights: decay is {decay}, expected 0 <= decay < 1")
        refuse_wrapped(model, "AveragedWeights")
        self.module = copy.deepcopy(model)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after optimizer step number `step`, from 0."""
        weight = 1.0 - min(self.decay, (1 + step) / (10 + step))
        averages: list[Tensor] = []
        values: list[Tensor] = []
        own = named_tensors(model)
        for name, average in named_tensors(self.module).items():
            if average.is_floating_point():
                averages.append(average)
                values.append(own[name])
            else:
                average.copy_(own[name])
        torch._foreach_lerp_(averages, values, weight)

    @torch.no_grad()
    def move_along(self, before: dict[str, Tensor], model: nn.Module) -> None:
        """Move by as much as the model's tensors have moved from `before`, values by name."""
        own, averages = named_tensors(model), named_tensors(self.module)
        for name, value in before.items():
            averages[name].add_(own[name] - value)
