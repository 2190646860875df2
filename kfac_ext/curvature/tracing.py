"""Finding the layers of a model by one forward: which modules and operators multiply a weight, what follows them."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from kfac_ext.curvature.modes import module_modes, undisturbed
from kfac_ext.curvature.outputs import Reading
from kfac_ext.layers import BatchNorm, Layer, can_be_folded, kind_of, layer_of
from kfac_ext.layers.composite import opened
from kfac_ext.layers.operators import OperatorCall, operator_call, transposed


def check_model(model: nn.Module) -> None:
    """Refuse what hooks cannot see: compiled models and lazy parameters, with an error that names the place."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"Curvature: model is {type(model).__name__}, expected torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("Curvature: model is scripted by torch.jit, expected the torch.nn.Module it was made of")
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "Curvature: model is a DataParallel, which calls copies of it; train model.module on one device"
        )
    if next(model.parameters(), None) is None:
        raise ValueError(f"Curvature: model {type(model).__name__} has no parameters")
    for name, module in model.named_modules():
        if "_orig_mod" in module._modules or vars(module).get("_compiled_call_impl") is not None:
            raise ValueError(
                f"Curvature: {name or 'the model'} is compiled by torch.compile, which hides layers from hooks; "
                "give the plain model and train it uncompiled"
            )
        for key, parameter in module.named_parameters(recurse=False):
            if nn.parameter.is_lazy(parameter):
                raise ValueError(f"Curvature: {name}.{key} is uninitialised (lazy); run one forward first")


def trace_layers(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    skip_layers: Iterable[str] = (),
    *,
    fold_norms: bool = True,
    max_factor_size: int | None = None,
    reading: Reading | None = None,
) -> dict[str, Layer]:
    """The layers that one forward calls, in that order, with the batch norms behind them.

    A layer is a module of a registered kind (`kfac_ext.layers`) or, in a module of any other type, a parameter that
    `F.linear`, `torch.matmul`, `torch.addmm` or a convolution takes itself, or turned, as its weight. A batch norm
    belongs to a layer if, in every call of the layer, its input is the very tensor that the layer gave and no other
    torch call takes that tensor (an in-place ReLU in between counts as one). The forward runs without gradients and
    leaves random streams and buffers untouched; batch norms are in eval mode (one sample is enough), all others in
    the mode they are in. Weights that get no factors are named in a warning, each with the reason.

    Args:
        model: any module.
        args: positional inputs of the model.
        kwargs: keyword inputs of the model.
        skip_layers: regular expressions; a layer whose name one of them matches (`re.search`) is left out.
        fold_norms: False: no layer gets a batch norm.
        max_factor_size: layers with a factor of more rows are left out; None: of more than 0.5 GB in the layer's dtype.
        reading: learns where the features of the output stand.

    Raises:
        ValueError: no layer is left; the output cannot be read.
        TypeError: the output cannot be read.
    """
    patterns = [re.compile(pattern) for pattern in skip_layers]
    idle = {pattern.pattern for pattern in patterns}
    seen = _observe(model, args, kwargs or {})
    if reading is not None:
        _learn(reading, seen)
    found: dict[str, Layer] = {}
    unused: list[str] = []
    reasons: dict[str, str] = {}
    for place, events in seen.by_weight().items():
        layer = seen.layer(place, events)
        name = layer.name if isinstance(layer, Layer) else seen.name(place)
        if skipped := [pattern.pattern for pattern in patterns if pattern.search(name)]:
            idle.difference_update(skipped)
            continue
        if isinstance(layer, Layer) and (too_large := _too_large(layer, max_factor_size)):
            layer = too_large
        if isinstance(layer, Layer):
            found[name] = layer
            if fold_norms:
                layer.norm = seen.norm_behind(layer, events)
                layer.norm_name = None if layer.norm is None else seen.names[layer.norm]
        elif layer == _NEVER_CALLED and kind_of(place.module) is not None:
            unused.append(name)
        else:
            reasons[name or seen.name(place, whole=True)] = f"{type(place.module).__name__}: {layer}"
    if unused:
        warnings.warn(f"Curvature: skipped, the forward never calls {', '.join(map(repr, unused))}", stacklevel=3)
    if reasons:
        listed = ", ".join(f"{name!r} ({reason})" for name, reason in reasons.items())
        warnings.warn(f"Curvature: no factors for {listed}", stacklevel=3)
    if idle:
        listed = ", ".join(map(repr, sorted(idle)))
        warnings.warn(f"Curvature: skip_layers: {listed} matches no layer", stacklevel=3)
    if not found:
        raise ValueError(
            "Curvature: the model's forward calls no Linear or convolution, nor an operator of theirs that takes a "
            "parameter itself as its weight (that skip_layers leaves); the class of a layer that computes its weight "
            "first can be entered by kfac_ext.layers.register"
        )
    return found


_NEVER_CALLED = "the forward never calls it"
_LARGEST = 500_000_000  # bytes of a factor


def _too_large(layer: Layer, largest: int | None) -> str:
    """Why a layer's factors are left out for their size; empty if they are not."""
    bytes_each = 8 if layer.weight.dtype == torch.float64 else 4
    limit = math.isqrt(_LARGEST // bytes_each) if largest is None else largest
    key, size = max(layer.factor_sizes().items(), key=lambda item: _rows(item[1]))
    rows = _rows(size)
    if rows <= limit:
        return ""
    factor, amount = key[len(layer.name) + 1 :], rows * rows * bytes_each / 1e9
    return f"its {factor} [{rows}, {rows}] of {amount:.2g} GB is above max_factor_size={limit}"


def _rows(size: int | tuple[int, int]) -> int:
    return size[1] if isinstance(size, tuple) else size


def _learn(reading: Reading, seen: _Observer) -> None:
    """Tell where the features stand in the output, from the layer that made it; refuse an output that is ambiguous."""
    try:
        tensors = reading.picked(seen.output)
    except (TypeError, ValueError):
        if seen.in_training:
            raise
        return  # in evaluation mode models may return something else
    events = [(e.output, _kind(e).channel_dim) for _, e in seen.events]
    if events:
        reading.features = [_features(tensor, events) for tensor in tensors]
    if seen.in_training:
        reading.prediction(tensors)


def _features(tensor: Tensor, events: Sequence[tuple[Tensor, int]]) -> tuple[int | None, int]:
    """Dimension and size of the features of the layer that made a tensor; else those of the last one, somewhere."""
    own = [dim for output, dim in events if output is tensor]
    if own:
        return own[-1], tensor.shape[own[-1]]
    output, dim = events[-1]
    return None, output.shape[dim]


def _kind(event: _Event) -> type[Layer]:
    kind = kind_of(event.host) if event.call is None else event.call.kind
    assert kind is not None
    return kind


class _Weight(NamedTuple):
    """A parameter of a module."""

    module: nn.Module
    key: str


class _Event(NamedTuple):
    """One use of a weight: by a module of a registered kind (no `call`), or by an operator in the forward of `host`."""

    host: nn.Module
    call: OperatorCall | None
    output: Tensor


class _Observer(TorchFunctionMode):
    """Takes down one forward: what multiplies which weight, in whose forward, and how often a tensor is taken."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {module: name for name, module in model.named_modules()}
        self.owners: dict[int, list[_Weight]] = {}
        for module in self.names:
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.dim() > 1:
                    self.owners.setdefault(id(parameter), []).append(_Weight(module, key))
        self.running: list[nn.Module] = []
        self.called: set[nn.Module] = set()
        self.norm_inputs: dict[int, nn.Module] = {}
        self.output: Any = None
        self.in_training = model.training
        self.events: list[tuple[int | None, _Event]] = []
        self._others: dict[tuple[nn.Module, int], str] = {}
        self._uses: Counter[int] = Counter()
        self._alive: list[Any] = []  # no id is used again

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        body = opened(func)
        if body is not None:
            with self:
                return body(*args, **kwargs)
        result = func(*args, **kwargs)
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            return result
        call = operator_call(func, args, kwargs)
        for leaf in tree_leaves((args, kwargs)):
            if not isinstance(leaf, Tensor):
                continue
            self._uses[id(leaf)] += 1
            self._alive.append(leaf)
            whole = transposed(leaf)
            weight = leaf if whole is None else whole
            if id(weight) not in self.owners or not self.running or result is leaf:  # `weight.to` may be no use of it
                continue
            if isinstance(result, Tensor) and transposed(result) is weight:  # what takes that is the use
                continue
            if call is not None and call.weight is weight and call.x is not leaf:
                self.events.append((id(weight), _Event(self.running[-1], call, result)))
            else:
                self._others.setdefault((self.running[-1], id(weight)), getattr(func, "__name__", str(func)))
        return result

    def enter(self, module: nn.Module, _args: Any) -> None:
        """A forward pre-hook of every module."""
        self.running.append(module)
        self.called.add(module)

    def leave(self, module: nn.Module, _args: Any, output: Any) -> None:
        """A forward hook of every module, called in any case."""
        self.running.pop()
        if kind_of(module) is not None and isinstance(output, Tensor):
            self.events.append((None, _Event(module, None, output)))

    def by_weight(self) -> dict[_Weight, list[_Event]]:
        """The uses of every weight, those with uses first and in the order of the first one."""
        found: dict[_Weight, list[_Event]] = {}
        for weight, event in self.events:
            kind = kind_of(event.host)
            if weight is None:
                assert kind is not None
                found.setdefault(_Weight(event.host, kind.weight_key), []).append(event)
                continue
            own = [place for place in self.owners[weight] if place.module is event.host]
            inside = set(event.host.modules())
            idle = [place for place in self.owners[weight] if place.module in inside - self.called]
            if kind is None and (own or idle):
                found.setdefault((own or idle)[0], []).append(event)
        for module in self.names:
            kind = kind_of(module)
            if kind is not None:
                found.setdefault(_Weight(module, kind.weight_key), [])
        for places in self.owners.values():
            for place in places:
                if kind_of(place.module) is None:
                    found.setdefault(place, [])
        return found

    def layer(self, place: _Weight, events: Sequence[_Event]) -> Layer | str:
        """The layer of a weight, or the reason why it is none."""
        name = self.names[place.module]
        if not events:
            return self._why_unused(place)
        host, call, _ = events[0]
        if call is None:
            return layer_of(place.module, name)
        for event in events:
            if event.call is None or event.host is not host or event.call[0] is not call.kind:
                return "its weight is multiplied in several ways"
            if event.call.bias is not call.bias or event.call.geometry != call.geometry:
                return "its weight is multiplied with several biases or geometries"
        other = self._others.get((host, id(call.weight)))
        if other is not None:
            return f"{other} takes its weight too"
        biases = {id(p): key for key, p in place.module.named_parameters(recurse=False)}
        if call.bias is not None and id(call.bias) not in biases:
            return "its bias is no parameter of its own"
        geometry = call.geometry
        if geometry is not None:
            geometry = {**geometry, "groups_attribute": getattr(place.module, "groups", None) == geometry["groups"]}
        return call.kind(
            place.module,
            name,
            keys=(place.key, None if call.bias is None else biases[id(call.bias)]),
            host=host,
            host_name=self.names[host],
            geometry=geometry,
        )

    def _why_unused(self, place: _Weight) -> str:
        weight = id(getattr(place.module, place.key))
        uses = {host: other for (host, taken), other in self._others.items() if taken == weight}
        other = uses.get(place.module)
        if other is None and place.module not in self.called:
            other = next(iter(uses.values()), None)  # in the forward of another module
        if other is not None:
            return f"{other} takes its weight"
        return "no operator takes its weight" if place.module in self.called else _NEVER_CALLED

    def name(self, place: _Weight, *, whole: bool = False) -> str:
        """The name of the layer that a weight would make; `whole`: of the weight."""
        module = self.names[place.module]
        return module if place.key == "weight" and not whole else f"{module}.{place.key}".lstrip(".")

    def norm_behind(self, layer: Layer, events: Sequence[_Event]) -> BatchNorm | None:
        """The batch norm that takes what every call of the layer gives, if nothing else does."""
        outputs = [event.output for event in events]
        if any(layer.channel_dim % output.dim() != 1 for output in outputs):  # batch norms have channels there
            return None
        norms = {self.norm_inputs.get(id(output)) if self._uses[id(output)] == 1 else None for output in outputs}
        return norms.pop() if len(norms) == 1 else None  # type: ignore[return-value]


def _observe(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Observer:
    """What one forward shows."""
    seen = _Observer(model)

    def on_norm(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        seen.norm_inputs[id(inputs[0] if inputs else keywords["input"])] = module

    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_var is not None]
    with ExitStack() as stack:
        for module in seen.names:
            stack.enter_context(module.register_forward_pre_hook(seen.enter))
            stack.enter_context(module.register_forward_hook(seen.leave, always_call=True))
            if can_be_folded(module):
                stack.enter_context(module.register_forward_pre_hook(on_norm, with_kwargs=True))
        stack.enter_context(undisturbed(model))
        stack.enter_context(module_modes(dict.fromkeys(norms, False)))
        stack.enter_context(torch.no_grad())
        stack.enter_context(seen)
        seen.output = model(*args, **kwargs)
    return seen
