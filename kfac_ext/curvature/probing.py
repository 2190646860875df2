"""Forwards of their own that say something of a watched model and count for nothing in its factors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from kfac_ext.curvature.calls import call_hooks
from kfac_ext.curvature.capture import Capture
from kfac_ext.curvature.curvature import Curvature
from kfac_ext.curvature.fisher import checked_output, input_covariance
from kfac_ext.curvature.modes import RngState, batch_statistics, device_of, module_modes, undisturbed
from kfac_ext.layers import Layer


def observe(curvature: Curvature, *args: Any, **kwargs: Any) -> Capture:
    """A forward on these inputs with gradients, in the modes that the model is in, without autocast."""
    curvature.trace(*args, **kwargs)
    device = device_of(curvature.model)
    capture = Capture(RngState.now(device))
    with ExitStack() as stack:
        stack.enter_context(curvature.paused())
        stack.enter_context(undisturbed(curvature.model))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(call_hooks(curvature.layers.values(), capture.add))
        capture.output = checked_output(curvature.model(*args, **kwargs), curvature.loss)
    return capture


def reached_layers(curvature: Curvature, *args: Any, **kwargs: Any) -> frozenset[str]:
    """The layers whose z a gradient of the output reaches, as parameters are frozen now; others get no factors.

    Args:
        curvature: of the model.
        args, kwargs: inputs of the model for one forward in evaluation mode.
    """
    curvature.trace(*args, **kwargs)
    with module_modes(dict.fromkeys(curvature.model.modules(), False)):
        capture = observe(curvature, *args, **kwargs)
    if not capture.output.requires_grad:
        return frozenset()
    gradients = capture.gradients_of(capture.output, torch.ones_like(capture.output))
    return frozenset(name for name, calls in gradients.items() if any(g is not None for g in calls))


def fresh_look(
    curvature: Curvature,
    names: Iterable[str],
    inputs: Tensor | Sequence[Any],
    mode: str = "expand",
    *,
    bias: bool | None = True,
) -> tuple[dict[str, Tensor], Tensor]:
    """A of the layers named, apart from the running factors, and the model's output [N, ...] from one forward.

    Batch norms use batch statistics (those frozen in a training model stay frozen), dropout is off, random streams and
    running statistics are untouched.

    Args:
        curvature: of the model.
        names: layers.
        inputs: a batch, or batches as `Curvature.recent_inputs` gives them (joined to one).
        mode: "expand" or "reduce".
        bias: append the 1, so that the last row and column hold the mean patch; None: as in the running factors.

    Raises:
        KeyError: naming what is no layer.
        RuntimeError: naming a layer that the forward does not call.
    """
    layers = [curvature.layer(name) for name in names]
    found: dict[str, list[tuple[int, Tensor]]] = {}

    def report(layer: Layer, x: Tensor, _z: Tensor) -> None:
        append = layer.constant if bias is None else bias
        found.setdefault(layer.name, []).append((len(x), input_covariance(layer, x, mode, bias=append)))

    with call_hooks(layers, report):
        output = fresh_output(curvature, inputs)
    for layer in layers:
        if layer.name not in found:
            raise RuntimeError(f"fresh_look: the forward did not call layer {layer.name!r}")
    return {layer.name: _weighted_mean(found[layer.name]) for layer in layers}, output


@torch.no_grad()
def fresh_output(curvature: Curvature, inputs: Tensor | Sequence[Any]) -> Tensor:
    """The model's output [N, ...] on `inputs` without gradients, in the modes of `fresh_look`.

    Args:
        curvature: of the model.
        inputs: a batch, or batches as `Curvature.recent_inputs` gives them (joined to one).
    """
    model = curvature.model
    with curvature.paused(), batch_statistics(model), undisturbed(model):
        return checked_output(model(*joined_inputs(inputs)), curvature.loss)


def joined_inputs(inputs: Tensor | Sequence[Any]) -> tuple[Tensor, ...]:
    """The positional inputs of one forward on all batches together."""
    if isinstance(inputs, Tensor):
        return (inputs,)
    batches = [batch if isinstance(batch, (tuple, list)) else (batch,) for batch in inputs]
    if not batches:
        raise ValueError("Curvature: inputs is empty, expected a batch or a sequence of batches")
    return tuple(torch.cat(parts) for parts in zip(*batches))


def _weighted_mean(values: list[tuple[int, Tensor]]) -> Tensor:
    total = sum(count for count, _ in values)
    return values[0][1] if len(values) == 1 else torch.stack([value * (n / total) for n, value in values]).sum(dim=0)
