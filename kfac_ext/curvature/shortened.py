"""What layers see of all samples of a call, and of all but one."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from kfac_ext.curvature.calls import call_hooks
from kfac_ext.curvature.modes import module_modes, plain_kernels, undisturbed
from kfac_ext.curvature.recent import Call
from kfac_ext.layers import Layer


def inputs_with_and_without_last(
    model: nn.Module, layers: Collection[Layer], call: Call, batch_dim: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """The first input of each layer in two forwards in evaluation mode, the second without the call's last sample.

    Empty if the model cannot be called so; of layers that are called in both alone.
    """
    found: list[dict[str, Tensor]] = [{}, {}]
    try:
        for inputs, one in zip(found, (call, call.without_last(batch_dim))):

            def report(layer: Layer, x: Tensor, _z: Tensor, inputs: dict[str, Tensor] = inputs) -> None:
                inputs.setdefault(layer.name, x.clone())

            with ExitStack() as stack:
                stack.enter_context(undisturbed(model))
                stack.enter_context(module_modes(dict.fromkeys(model.modules(), False)))
                stack.enter_context(plain_kernels())  # the fast path of attention calls none of its layers
                stack.enter_context(call_hooks(layers, report))
                stack.enter_context(torch.no_grad())
                one.run(model)
    except (RuntimeError, ValueError, IndexError, AssertionError):
        return {}
    return {name: (x, found[1][name]) for name, x in found[0].items() if name in found[1]}
