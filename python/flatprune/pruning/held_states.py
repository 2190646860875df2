"""What a pruner knows of the optimizers that train its model: which there are, and what they keep."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from flatprune.coupling import NeuronGroup
from flatprune.cutting.optimizers import StepWatch, as_optimizers, check_held, some_of, unheld_parameters
from flatprune.cutting.rehearsal import Seen
from flatprune.cutting.states import check_states, keeps_tensors, rehearsed


class HeldStates:
    """The optimizers of a model and what they keep, or will keep, of its parameters.

    Warns of trainable parameters that none of those given holds, and watches for others that step: those that were
    forgotten, or made later.

    Args:
        model: the network.
        optimizer: as `Pruner` takes it.

    Attributes:
        optimizers: all that are known by now.
        seen: how their states lie along the parameters, see `flatprune.cutting.rehearsal`.

    Raises:
        TypeError: something in `optimizer` is none.
        ValueError: LBFGS is among them, or none of them holds a parameter of the model.
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.model, self.seen = model, Seen()
        self.optimizers: tuple[torch.optim.Optimizer, ...] = as_optimizers(optimizer, "Pruner: optimizer")
        check_held(model, self.optimizers, "Pruner: optimizer")
        self._watch = StepWatch()
        unheld = unheld_parameters(model, self.optimizers)
        if unheld and optimizer is not None:  # None says that there is nothing to cut
            warnings.warn(
                f"Pruner: no optimizer that was given holds {some_of(unheld)}; give all that train the model, "
                "optimizer=[...], or set requires_grad=False where nothing trains",
                stacklevel=3,
            )

    def rehearse(self, groups: Sequence[NeuronGroup]) -> None:
        """Judge the states that there are and that steps will make; raises ValueError, see `check_states`."""
        self.seen = rehearsed(self.model, groups, self.optimizers)
        self.check(groups)

    def check(self, groups: Sequence[NeuronGroup]) -> None:
        """Judge the states that there are; raises ValueError, see `check_states`."""
        check_states(self.model, groups, self.optimizers, self.seen)

    def take_in_stepped(self) -> None:
        """Know from now on the optimizers that were not given but were seen to step; warns if they keep something."""
        found = self._watch.holders_of(self.model, self.optimizers)
        self.optimizers += tuple(found)
        if keeps_tensors(found):
            kinds = ", ".join(sorted({type(optimizer).__name__ for optimizer in found}))
            warnings.warn(
                f"Pruner: {kinds}, which was not given, trains parameters of the model; its states are cut from now on "
                "too, but give it to the constructor, optimizer=[...], so that it is judged before training",
                stacklevel=3,
            )
