"""Predictions that the loss leaves out (labels of -100, padding) count nowhere: not in A either.

Which they are shows the gradient of the user's own loss at the output. A row of a layer's input is left out if it
belongs to predictions that are left out *and* no gradient reaches it: a padded token that others attend to is no
padding to the layers before.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from kfac_ext.curvature.outputs import Reading, tensors_of
from kfac_ext.layers import Layer
from kfac_ext.ops.covariance_group import CovarianceUpdate


class OutputGradient:
    """The gradient of the user's loss at what the loss is of, as the backward brings it.

    Args:
        output: what the model returned.
        tensors: what of it the loss is of; made by a function from `output`, or part of it.
        reading: how they are read.
        arrived: called as soon as it is there.

    Attributes:
        value: the gradient, read like the prediction; None: not yet there.
    """

    def __init__(
        self, output: Any, tensors: Sequence[Tensor], reading: Reading, arrived: Callable[[], None] | None = None
    ) -> None:
        self.reading, self._arrived = reading, arrived
        self.value: Tensor | None = None
        self._function = None
        watched: Sequence[Any] = tensors
        if callable(reading.output):
            held = tensors_of(output)
            if not all(any(one is tensor for one in held) for tensor in tensors):
                self._function = reading.output
                watched, self._tree = tree_flatten(output)
        self._watched = [one if isinstance(one, Tensor) and one.requires_grad else None for one in watched]
        self._others = [None if kept is not None else one for kept, one in zip(self._watched, watched)]
        self._gradients: dict[int, Tensor] = {}
        for place, leaf in enumerate(self._watched):
            if leaf is not None:
                leaf.register_hook(self._hook(place))

    def take(self, loss: Tensor) -> None:
        """Compute it from a loss, whose graph stays."""
        leaves = {place: leaf for place, leaf in enumerate(self._watched) if leaf is not None}
        found = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, allow_unused=True)
        self._arrived = None
        for place, gradient in zip(leaves, found):
            if gradient is not None:
                self._add(place, gradient)

    def _hook(self, place: int) -> Callable[[Tensor], None]:
        own = weakref.ref(self)  # the graph must not hold what holds the graph

        def hook(gradient: Tensor) -> None:
            waiting = own()
            if waiting is not None:
                waiting._add(place, gradient)

        return hook

    def _add(self, place: int, gradient: Tensor) -> None:
        if place in self._gradients:
            return
        self._gradients[place] = gradient.detach()
        if self._function is None:
            if len(self._gradients) < sum(leaf is not None for leaf in self._watched):
                return
            found: Sequence[Any] = [self._gradients.get(i, other) for i, other in enumerate(self._others)]
        else:  # a function that picks and turns round does the same to gradients
            tree = tree_unflatten([self._filled(i) for i in range(len(self._watched))], self._tree)
            made = self._function(tree)
            found = list(made) if isinstance(made, (tuple, list)) else [made]
            if not any(bool(part.any()) for part in found):
                return
        self.value = self.reading.prediction(found)
        if self._arrived is not None:
            self._arrived()

    def _filled(self, place: int) -> Any:
        leaf = self._watched[place]
        return self._others[place] if leaf is None else self._gradients.get(place, torch.zeros_like(leaf))


def counted_rows(layer: Layer, x: Tensor, g: Tensor, positions: Sequence[Tensor]) -> Tensor | None:
    """Which rows of a call count, bool [N, positions of the layer]; None: all, or it cannot be told.

    Args:
        layer: of the call.
        x, g: its input and gradient, samples first.
        positions: which predictions count, bool [N, P] of each output that the layer leads to.
    """
    count = layer.position_count(x)
    if not positions or any(len(x) != len(of_output) for of_output in positions):
        return None
    rows = layer.gradient_rows(g)
    if rows.shape[:2] != (len(x), count):
        return None
    kept = rows.any(dim=-1)
    for of_output in positions:
        kept = kept | (of_output if of_output.shape[1] == count else of_output.any(dim=1, keepdim=True))
    return None if bool(kept.all()) else kept


def counted_input_updates(
    layer: Layer, inputs: Sequence[Tensor], kept: Sequence[Tensor | None], mode: str, *, decay: float, scale: float
) -> list[CovarianceUpdate]:
    """`layer.A` <- decay A + scale (A over the rows that count, of all calls of the layer in one forward)."""
    rows = [layer.input_rows(x) for x in inputs]
    masks = [r.new_ones(r.shape[:2], dtype=torch.bool) if k is None else k for r, k in zip(rows, kept)]
    if mode == "reduce":
        all_rows, all_masks = torch.cat(rows, dim=1), torch.cat(masks, dim=1)
        counts = all_masks.sum(dim=1)
        means = (all_rows * all_masks.unsqueeze(-1)).sum(dim=1) / counts.clamp_min(1).unsqueeze(-1)
        chosen = means[counts > 0]
    else:
        chosen = torch.cat([r[m] for r, m in zip(rows, masks)])
    if not len(chosen):
        return []
    pixels = chosen[:, :, None, None]  # one position: a block a group, as of a 1x1 convolution
    options: dict[str, Any] = {"groups": layer.groups, "bias": layer.constant, "decay": decay, "scale": scale}
    return [CovarianceUpdate.conv2d(f"{layer.name}.A", pixels, 1, **options)]
