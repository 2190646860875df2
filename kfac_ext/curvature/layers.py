"""The layers of a model that get factors: their forward order, the batch norm behind each, hooks on their calls."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from kfac_ext.curvature.convolution import CONVOLUTIONS, TRANSPOSED, Convolution, weight_matrix

LAYER_TYPES = (nn.Linear, *CONVOLUTIONS)
_TYPE_NAMES = ", ".join(f"nn.{kind.__name__}" for kind in LAYER_TYPES)


class Layer(NamedTuple):
    """A Linear or convolution and, where its output goes into a batch norm and nowhere else, that batch norm.

    `z`, the layer's pre-activation, is the output of `norm` if there is one, else of `module`.
    """

    name: str
    module: nn.Linear | Convolution
    norm: nn.BatchNorm1d | nn.BatchNorm2d | None = None
    norm_name: str | None = None

    @property
    def is_convolution(self) -> bool:
        """Whether the channels of z are its second dimension, not its last."""
        return isinstance(self.module, CONVOLUTIONS)

    @property
    def groups(self) -> int:
        """1 for Linear, the convolution's groups otherwise."""
        return self.module.groups if isinstance(self.module, CONVOLUTIONS) else 1

    @property
    def outputs(self) -> int:
        """O: out_features or out_channels, from the shape of the weight."""
        return self.module.weight.numel() // self.patch_size

    @property
    def patch_size(self) -> int:
        """d: the inputs of one output, in_features or in_channels/groups kh kw."""
        weight = self.module.weight
        if isinstance(self.module, TRANSPOSED):  # [in, out/groups, kernel]
            return len(weight) // self.groups * weight[0, 0].numel()
        return weight[0].numel()

    @property
    def constant(self) -> bool:
        """Whether the map to z has a constant part (a bias, or the batch norm's shift): then A has a last row for 1."""
        return self.module.bias is not None or self.norm is not None

    def factor_sizes(self) -> dict[str, int | tuple[int, int]]:
        """Sizes of the factors `name.A` and `name.G` as `kfac_ext.FactorSet` takes them."""
        inputs, outputs = self.patch_size + self.constant, self.outputs
        if self.groups == 1:
            return {f"{self.name}.A": inputs, f"{self.name}.G": outputs}
        return {f"{self.name}.A": (self.groups, inputs), f"{self.name}.G": (self.groups, outputs // self.groups)}

    @torch.no_grad()
    def folded_weight(self) -> Tensor:
        """V [O, d] or, if `constant`, [O, d + 1] with z = V [a; 1]: the batch norm's affine map is part of V.

        With s = gamma / sqrt(running_var + eps): V[:, :d] = s W (patch order c, kh, kw, see `weight_matrix`) and
        V[:, d] = s (bias - running_mean) + beta. The running statistics are used, as in eval mode.
        """
        weight = weight_matrix(self.module)
        bias = self.module.bias
        shift = weight.new_zeros(len(weight)) if bias is None else bias
        if self.norm is not None:
            scale, offset = _norm_affine(self.norm)
            weight, shift = scale[:, None] * weight, scale * shift + offset
        return torch.cat([weight, shift[:, None]], dim=1) if self.constant else weight.clone()


def _norm_affine(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """(s, t) of the batch norm in eval mode, x -> s x + t."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    offset = -norm.running_mean * scale
    return scale, offset if norm.bias is None else offset + norm.bias


@contextmanager
def call_hooks(layers: Iterable[Layer], report: Callable[[Layer, Tensor, Tensor], Tensor | None]) -> Iterator[None]:
    """While open, each call of a layer is reported as `report(layer, input, z)`; a tensor it returns replaces z.

    z is seen before a following in-place activation changes it.
    """
    awaiting: dict[int, tuple[Layer, Tensor, Tensor]] = {}

    def on_layer(layer: Layer) -> Callable[..., Tensor | None]:
        @torch.compiler.disable  # the layers around stay compiled
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            x = args[0] if args else kwargs["input"]
            x = x if x.dim() > 1 else x[None]
            if isinstance(layer.module, TRANSPOSED) and (len(args) > 1 or kwargs.get("output_size") is not None):
                raise ValueError(
                    f"Curvature: layer {layer.name!r} is called with output_size, which changes its geometry from call "
                    "to call; set output_padding instead, or leave it out by skip_layers"
                )
            if layer.norm is None:
                return report(layer, x, output)
            awaiting[id(output)] = (layer, x, output)  # the reference keeps the id from being used again
            return None

        return hook

    @torch.compiler.disable
    def on_norm(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        source = awaiting.pop(id(args[0] if args else kwargs["input"]), None)
        return None if source is None else report(source[0], source[1], output)

    layers = list(layers)
    norms = {id(layer.norm): layer.norm for layer in layers if layer.norm is not None}
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.module.register_forward_hook(on_layer(layer), with_kwargs=True))
        for norm in norms.values():
            stack.enter_context(norm.register_forward_hook(on_norm, with_kwargs=True))
        yield


class RngState(NamedTuple):
    """The states of torch's default generators of the CPU and of one device."""

    cpu: Tensor
    device: torch.device
    accelerator: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RngState:
        """The states as they stand."""
        accelerator = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), device, accelerator)

    def restore(self) -> None:
        """Set the generators to these states."""
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.cuda.set_rng_state(self.accelerator, self.device)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter; the CPU if it has none."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def reading_is_free(device: torch.device) -> bool:
    """Whether the host may look at a tensor there without waiting for work that is queued."""
    return device.type == "cpu"


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`, without waiting for work that is queued there."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@contextmanager
def undisturbed(model: nn.Module, rng: RngState | None = None) -> Iterator[None]:
    """Forwards inside leave random streams, running statistics and other buffers as they were.

    Args:
        model: batch norms in training mode still normalise by the batch.
        rng: where the random streams stand inside (default: where they are), so that dropout draws the same masks.
    """
    outside = RngState.now(device_of(model))
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    kept = [
        (module, key, buffer, buffer._version, buffer.clone())
        for module in model.modules()
        if not isinstance(module, _NormBase)
        for key, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        for norm in norms:
            norm.track_running_stats = False
        if rng is not None:
            rng.restore()
        yield
    finally:
        outside.restore()
        for norm in norms:
            norm.track_running_stats = True
        for module, key, buffer, version, copy in kept:
            module._buffers[key] = buffer
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(copy)


@contextmanager
def module_modes(modes: Mapping[nn.Module, bool]) -> Iterator[None]:
    """Set the `training` flag of each module alone; put back at the end."""
    before = {module: module.training for module in modes}
    try:
        for module, mode in modes.items():
            module.training = mode
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, batch norms normalise by the batch (those frozen in a training model stay frozen); dropout is off."""
    modes = {
        module: isinstance(module, _BatchNorm) and (module.training or not model.training) for module in model.modules()
    }
    with module_modes(modes):
        yield


class _Uses(TorchFunctionMode):
    """Counts the torch calls that take a tensor and return one, by the id of the tensor taken."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[int] = Counter()
        self.alive: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor):
                    self.count[id(leaf)] += 1
                    self.alive.append(leaf)
        return result


def check_model(model: nn.Module) -> None:
    """Refuse what hooks cannot see: compiled models and lazy parameters, with an error that names the place."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"Curvature: model is {type(model).__name__}, expected torch.nn.Module")
    if next(model.parameters(), None) is None:
        raise ValueError(f"Curvature: model {type(model).__name__} has no parameters")
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
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
) -> dict[str, Layer]:
    """The Linear and convolution layers that one forward calls, in that order, with the batch norms behind them.

    A batch norm belongs to a layer if, in every call of the layer, its input is the very tensor that the layer gave
    and no other torch call takes that tensor (an in-place ReLU in between counts as one). The forward runs without
    gradients and leaves random streams and buffers untouched; batch norms are in eval mode (one sample is enough),
    all other modules in the mode they are in.

    Args:
        model: any module.
        args: positional inputs of the model.
        kwargs: keyword inputs of the model.
        skip_layers: regular expressions; a layer whose name one of them matches (`re.search`) is left out.
        fold_norms: False: no layer gets a batch norm.

    Raises:
        ValueError: no layer is left.
    """
    patterns = [re.compile(pattern) for pattern in skip_layers]
    names = {name: m for name, m in model.named_modules() if not any(p.search(name) for p in patterns)}
    candidates = {name: m for name, m in names.items() if isinstance(m, LAYER_TYPES)}
    calls, norm_inputs, uses = _observe(model, candidates, args, kwargs or {})
    _warn_left_out(names, [name for name in candidates if name not in calls])
    if not calls:
        raise ValueError(f"Curvature: the model's forward calls none of {_TYPE_NAMES} (that skip_layers leaves)")
    norm_names = {module: name for name, module in model.named_modules()}
    layers = {}
    for name, outputs in calls.items():
        followers = {norm_inputs.get(id(output)) if uses.count[id(output)] == 1 else None for output in outputs}
        norm = followers.pop() if fold_norms and len(followers) == 1 else None
        layers[name] = Layer(name, candidates[name], norm, None if norm is None else norm_names[norm])  # type: ignore[arg-type]
    return layers


def _observe(
    model: nn.Module, candidates: Mapping[str, nn.Module], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[dict[str, list[Tensor]], dict[int, nn.Module], _Uses]:
    """One forward: the outputs of each layer in order, the batch norm that takes a tensor (by id), the uses."""
    calls: dict[str, list[Tensor]] = {}
    norm_inputs: dict[int, nn.Module] = {}
    uses = _Uses()

    def on_layer(name: str) -> Callable[..., None]:
        return lambda _module, _args, output: calls.setdefault(name, []).append(output)

    def on_norm(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        norm_inputs[id(inputs[0] if inputs else keywords["input"])] = module

    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    with ExitStack() as stack:
        for name, module in candidates.items():
            stack.enter_context(module.register_forward_hook(on_layer(name)))
        for norm in norms:
            if norm.running_var is not None:  # without running statistics nothing can be folded
                stack.enter_context(norm.register_forward_pre_hook(on_norm, with_kwargs=True))
        stack.enter_context(undisturbed(model))
        stack.enter_context(module_modes({norm: False for norm in norms if norm.running_var is not None}))
        stack.enter_context(torch.no_grad())
        stack.enter_context(uses)
        model(*args, **kwargs)
    return calls, norm_inputs, uses


def _warn_left_out(names: Mapping[str, nn.Module], unused: list[str]) -> None:
    """One warning each for layers that are never called and for modules whose weights get no factors."""
    if unused:
        warnings.warn(f"Curvature: skipped, the forward never calls {', '.join(map(repr, unused))}", stacklevel=4)
    other = [
        f"{name!r} ({type(module).__name__})" if name else f"the model's own parameters ({type(module).__name__})"
        for name, module in names.items()
        if not isinstance(module, LAYER_TYPES)
        and any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
    ]
    if other:
        warnings.warn(f"Curvature: no factors (only {_TYPE_NAMES} have them) for {', '.join(other)}", stacklevel=4)
