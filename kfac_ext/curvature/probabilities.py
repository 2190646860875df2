"""Outputs that are probabilities already, where the loss is of logits: G would be wrong, and nothing raises."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from kfac_ext.curvature.capture import Capture
from kfac_ext.curvature.loss import Loss
from kfac_ext.curvature.losses import SeveralLosses
from kfac_ext.curvature.modes import reading_is_free

_UPDATES = 5  # in all of which outputs look like probabilities: logits may do so in one
_VIEWS = ("View", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Permute", "Select", "Slice", "Alias", "ToCopy")


class ProbabilityWatch:
    """Warns once of outputs that are probabilities, by the operator that made them or by all of their first values.

    Args:
        loss: which says what its logits are put through (`Loss.activation`).
    """

    def __init__(self, loss: Loss) -> None:
        self._losses: Sequence[Loss] = loss.losses if isinstance(loss, SeveralLosses) else [loss]
        self._loss = loss
        self._seen = {place: 0 for place, one in enumerate(self._losses) if one.activation}

    def look(self, capture: Capture) -> None:
        """Take down one update; on a GPU only what made the outputs, which takes no waiting."""
        for place in list(self._seen):
            tensor = capture.tensors[place]
            if _is_made_by(self._losses[place].activation, tensor):
                self._warn(place)
            elif reading_is_free(tensor.device):
                self._look_at_values(place, capture.prediction)

    def _look_at_values(self, place: int, prediction: Tensor) -> None:
        values = self._loss.apart(prediction)[place] if isinstance(self._loss, SeveralLosses) else prediction
        with torch.no_grad():
            if values.numel() and not self._losses[place].are_probabilities(values):
                del self._seen[place]
                return
        self._seen[place] += 1
        if self._seen[place] == _UPDATES:
            self._warn(place)

    def _warn(self, place: int) -> None:
        del self._seen[place]
        loss = self._losses[place]
        which = f"loss[{place}]={loss.name!r}" if len(self._losses) > 1 else f"loss={loss.name!r}"
        warnings.warn(
            f"Curvature: the model's outputs are probabilities, as a {loss.activation} gives them; {which} expects "
            f"logits and puts them through the {loss.activation} itself, so that G is wrong. Have the model return "
            f"logits, or give output={loss.inverse}, which makes logits of them",
            stacklevel=2,
        )


def _is_made_by(activation: str, tensor: Tensor) -> bool:
    """Whether an output is what this function returned, but for its shape and dtype."""
    node: Node | None = tensor.grad_fn
    while node is not None and node.name().startswith(_VIEWS):
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith(f"{activation.capitalize()}Backward")
