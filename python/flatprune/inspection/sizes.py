"""What a network is made of, layer by layer, before and after pruning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from flatprune.coupling.example_inputs import example_calls
from flatprune.inspection.columns import aligned
from flatprune.models import module_macs
from flatprune.pruning.latency import measure


@dataclass(frozen=True)
class LayerSize:
    """One module's own part of a network.

    Attributes:
        name: qualified; "" for the network itself.
        kind: name of its class.
        width: output channels or features, of other weights the size of the first dimension; None without a weight.
        params: trainable scalars that it holds itself; one shared with an earlier module counts there.
        macs: multiply-accumulates that it makes itself for the example inputs.
    """

    name: str
    kind: str
    width: int | None
    params: int
    macs: int


@dataclass(frozen=True)
class Summary:
    """A network, layer by layer; `print` shows the table.

    Attributes:
        layers: modules that hold parameters or multiply, in the order of `named_modules`.
        params, macs: sums over them.
        latency: milliseconds of a forward in evaluation mode, the median over repeats.
        before: the same of another network, shown beside it.
    """

    layers: tuple[LayerSize, ...]
    latency: float
    before: Summary | None = field(default=None, repr=False)

    @property
    def params(self) -> int:
        """Trainable scalars."""
        return sum(layer.params for layer in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a call."""
        return sum(layer.macs for layer in self.layers)

    def __str__(self) -> str:
        before = self.before
        old = {} if before is None else {layer.name: layer for layer in before.layers}
        rows = [("layer", "kind", "width", "parameters", "multiply-accumulates")]
        rows += [_row(layer, old.get(layer.name)) for layer in self.layers]
        first = before or self
        rows.append(("all", "", "", _change(first.params, self.params), _change(first.macs, self.macs)))
        last = f"latency {self.latency:.3g} ms" + ("" if before is None else f", {before.latency:.3g} before")
        return f"{aligned(rows)}\n{last}"


def summary(model: nn.Module, example_inputs: Any, *, before: Summary | None = None) -> Summary:
    """Layers, widths, parameters, multiply-accumulates and latency of any network that runs eagerly.

    Args:
        model: stays as it is.
        example_inputs: as for `flatprune.Pruner`; what is counted and timed is one call with them.
        before: of the network before it was pruned, to be shown beside this one.

    Raises:
        TypeError, ValueError: `example_inputs` are none, see `flatprune.coupling.example_inputs`; `before` is no
            summary.

    Example:
        >>> dense = flatprune.summary(model, x)
        >>> ...  # training, with pruning
        >>> print(flatprune.summary(model, x, before=dense))
    """
    if before is not None and not isinstance(before, Summary):
        raise TypeError(f"summary: before is {before!r}, expected what `flatprune.summary` gave, or None")
    call = example_calls(model, example_inputs)[0]
    macs = module_macs(model, *call.args, **call.kwargs)
    layers, seen = [], set()
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen |= {id(p) for p in own}
        params, made = sum(p.numel() for p in own), macs.get(name, 0)
        if params or made:
            layers.append(LayerSize(name, type(module).__name__, _width(module), params, made))
    seconds = measure(model, call.args, call.kwargs)
    return Summary(tuple(layers), 1000 * seconds, before)


def _width(module: nn.Module) -> int | None:
    for name in ("out_channels", "out_features"):  # of a transposed convolution the weight's first dimension is another
        if isinstance(size := getattr(module, name, None), int):
            return size
    weight = getattr(module, "weight", None)
    return len(weight) if isinstance(weight, Tensor) and weight.dim() else None


def _row(layer: LayerSize, was: LayerSize | None) -> tuple[str, str, str, str, str]:
    old = layer if was is None else was
    sizes = ((old.width, layer.width), (old.params, layer.params), (old.macs, layer.macs))
    width, params, macs = (_change(*pair) for pair in sizes)
    return layer.name or "(itself)", layer.kind, width, params, macs


def _change(before: int | None, now: int | None) -> str:
    if now is None:
        return ""
    return f"{now:,}" if before is None or before == now else f"{before:,} -> {now:,}"
