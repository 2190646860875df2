"""Calls of layers, seen by hooks or, in modules of no registered kind, by what their operators take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kfac_ext.curvature.capture import uncompiled
from kfac_ext.layers import Layer
from kfac_ext.layers.composite import opened
from kfac_ext.layers.operators import operator_call

Report: TypeAlias = "Callable[[Layer, Tensor, Tensor], Tensor | None]"


@contextmanager
def call_hooks(layers: Iterable[Layer], report: Report) -> Iterator[None]:
    """While open, each call of a layer is reported as `report(layer, input, z)`; a tensor it returns replaces z.

    z is seen before a following in-place activation changes it.

    Raises:
        ValueError: from a call whose geometry is not that which was traced, or whose input has another shape.
    """
    awaiting: dict[int, tuple[Layer, Tensor, Tensor]] = {}

    def deliver(layer: Layer, x: Tensor, z: Tensor) -> Tensor | None:
        if layer.norm is None:
            return report(layer, x, z)
        awaiting[id(z)] = (layer, x, z)  # the reference keeps the id from being used again
        return None

    def on_layer(layer: Layer) -> Callable[..., Tensor | None]:
        @uncompiled  # the layers around stay compiled
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            return deliver(layer, layer.input_of(args, kwargs), output)

        return hook

    @uncompiled
    def on_norm(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        source = awaiting.pop(id(args[0] if args else kwargs["input"]), None)
        return None if source is None else report(source[0], source[1], output)

    layers = list(layers)
    norms = {id(layer.norm): layer.norm for layer in layers if layer.norm is not None}
    hosts: dict[nn.Module, list[Layer]] = {}
    with ExitStack() as stack:
        for layer in layers:
            if layer.host is not None:
                hosts.setdefault(layer.host, []).append(layer)
            else:
                stack.enter_context(layer.module.register_forward_hook(on_layer(layer), with_kwargs=True))
        for host, inside in hosts.items():
            stack.enter_context(_watched(host, inside, deliver))
        for norm in norms.values():
            stack.enter_context(norm.register_forward_hook(on_norm, with_kwargs=True))
        yield


@contextmanager
def _watched(host: nn.Module, layers: list[Layer], deliver: Report) -> Iterator[None]:
    """Inside, the operators in the forward of `host` that take the weight of a layer deliver what they see."""
    forward, is_own = host.forward, "forward" in vars(host)

    @uncompiled
    def watched(*args: Any, **kwargs: Any) -> Any:
        lead = next((x.shape[:-1] for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim()), None)
        with _Watch({id(layer.weight): layer for layer in layers}, lead, deliver):
            return forward(*args, **kwargs)

    host.forward = watched  # a `with` of its own is left whatever the forward raises; a hook may not be called
    try:
        yield
    finally:
        if is_own:
            host.forward = forward
        else:
            del host.forward


class _Watch(TorchFunctionMode):
    """Delivers the calls of operators whose weight is that of a layer, by the id of the weight.

    `lead`, the shape of the host's input but for its last dimension, tells the samples of rows [N T, d] apart.
    """

    def __init__(self, layers: dict[int, Layer], lead: torch.Size | None, deliver: Report) -> None:
        super().__init__()
        self.layers, self.lead, self.deliver = layers, lead, deliver
        self.sequence: tuple[int, int] | None = None  # T and N where rows are [T, N, d] or [T N, d]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        body = opened(func)
        if body is not None:
            return self._inside(body, args, kwargs)
        z = func(*args, **kwargs)
        call = operator_call(func, args, kwargs)
        layer = None if call is None else self.layers.get(id(call.weight))
        if call is None or layer is None:
            return z
        if not call.agrees(layer):
            raise ValueError(
                f"Curvature: layer {layer.name!r} is called with {call.geometry or func.__name__}, otherwise than when "
                "the layers were found; leave it out by skip_layers"
            )
        lead = self._lead(layer, call.x)
        if lead is None:
            replaced = self.deliver(layer, layer.checked_input(call.x), z)
            return z if replaced is None else replaced
        x, apart = (t.reshape(*lead, t.shape[-1]) for t in (call.x, z))
        if self.sequence is not None:
            x, apart = x.transpose(0, 1), apart.transpose(0, 1)
        apart = torch.ops.aten._unsafe_view(apart, apart.shape)  # a view would be gone round by an activation in place
        replaced = self.deliver(layer, x, apart)
        apart = apart if replaced is None else replaced
        return (apart if self.sequence is None else apart.transpose(0, 1)).reshape(z.shape)

    def _inside(self, body: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the body of a function with the mode on."""
        query = args[0] if args else kwargs["query"]
        self.sequence = (len(query), query.shape[1] if query.dim() == 3 else 1)
        try:
            with self:
                return body(*args, **kwargs)
        finally:
            self.sequence = None

    def _lead(self, layer: Layer, x: Tensor) -> tuple[int, int] | None:
        """How rows are to be arranged in two dimensions; None: they are fine as they are."""
        if layer.is_convolution or layer.norm is not None:
            return None
        if self.sequence is not None:
            return (len(x), x.shape[1]) if x.dim() == 3 else self.sequence
        if x.dim() != 2 or self.lead is None or len(self.lead) < 2 or self.lead.numel() != len(x):
            return None
        return self.lead[0], len(x) // self.lead[0]
