"""The dry run that proves a group can be cut: trial cuts of a model against the same neurons masked.

Masked means that the columns of all consumers that read a neuron are zero. A layer norm or group norm takes its
statistics over all its channels; cutting some leaves statistics over the survivors, so that is what the masked network
does too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from flatprune.cutting.cuts import LayerCut, layer_cuts, tensor_name
from flatprune.cutting.neurons import (
    CONSUMER,
    JOINT_NORMS,
    NeuronGroup,
    Refused,
    groups_of,
    inputs_of_group,
    is_transposed,
    weight_of,
)

# Of the effect that masking has: a wrong channel is off by about 1, a norm over neighbouring channels by 1e-5.
_TOLERANCES = {torch.float64: 1e-6}
_TOLERANCE = 1e-3  # in all other dtypes
_ROUNDING = 100  # sums in another order differ by some units in the last place of the largest output


class Trial:
    """Trial cuts of a model on given inputs, in float64 where it runs in that; it is left as it was.

    Args:
        model: in evaluation mode.
        inputs: its positional arguments.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._model, self._inputs, self._tensors = model, inputs, {}
        try:
            self._tensors = _in_double(model)
            self._inputs = tuple(value.double() if is_float(value) else value for value in inputs)
            self._full = self._outputs({})
        except Exception:  # a dtype is written into the model, or the device has no float64
            self._tensors, self._inputs = {}, inputs
            self._full = self._outputs({})

    @torch.no_grad()
    def check(self, group: NeuronGroup) -> None:
        """Cut every second neuron of a group and, apart from that, mask it; both networks must compute the same.

        Raises:
            Refused: an operation fails, an output changes its shape, or the outputs differ.
        """
        if group.width < 2 * group.groups:
            return
        pruned = _every_second(group)
        cuts = list(layer_cuts([group], {0: pruned}).values())
        smaller = {name: cut.apply(self._tensors.get(name, tensor)) for c in cuts for name, tensor, cut in c.tensors()}
        with survivors_only(cuts):
            expected = self._outputs(masked_weights([group], {0: pruned}, self._tensors))
        try:
            with _trial_attributes(cuts):
                found = self._outputs(smaller)
        except (RuntimeError, ValueError, IndexError) as error:
            reason = f"the network does not run after a trial cut ({str(error).splitlines()[0][:120]})"
            raise Refused(reason) from error
        for full, masked, cut in zip(self._full, expected, found):
            _compare(full, masked, cut)

    def _outputs(self, changed: Mapping[str, Tensor]) -> list[Tensor]:
        # tie_weights would put the tensors of a module with two names back in the wrong order, and leave copies in it
        tensors = {**self._tensors, **changed}
        return _leaves(functional_call(self._model, tensors, self._inputs, tie_weights=False))


def _in_double(model: nn.Module) -> dict[str, Tensor]:
    """Name -> float64 copy of every floating-point tensor, under each of the modules that share it."""
    copies: dict[int, Tensor] = {}
    found = {}
    for layer, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and is_float(tensor):
                found[tensor_name(layer, key)] = copies.setdefault(id(tensor), tensor.detach().double())
    return found


def _every_second(group: NeuronGroup) -> Tensor:
    rank = torch.empty(group.width, dtype=torch.int64)  # position of each neuron within its slice
    for part in range(group.groups):
        neurons = (group.group_of == part).nonzero().flatten()
        rank[neurons] = torch.arange(len(neurons))
    return (rank % 2 == 0).nonzero().flatten()


def _compare(full: Tensor, masked: Tensor, cut: Tensor) -> None:
    if masked.shape != cut.shape:
        raise Refused("it is an output of the model")
    if masked.numel() == 0:
        return
    rounding = _ROUNDING * torch.finfo(masked.dtype).eps * float(masked.abs().max())
    fraction = _TOLERANCES.get(masked.dtype, _TOLERANCE)
    tolerance = max(fraction * float((masked - full).abs().max()), rounding)
    if not torch.allclose(masked, cut, rtol=0, atol=tolerance, equal_nan=True):
        raise Refused("a trial cut changed the function of the other neurons (an operation mixes channels)")


def masked_weights(
    groups: Sequence[NeuronGroup], pruned: Mapping[int, Tensor], tensors: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Weights of all consumers with zeros in the columns of the pruned neurons, by qualified name.

    A model that runs with them (`torch.func.functional_call`), and with `survivors_only`, computes what it does without
    the neurons.

    Args:
        groups: the neuron groups.
        pruned: position in `groups` -> int64 [m] neurons.
        tensors: weights to take instead of the modules' own.
    """
    masked = dict(tensors or {})
    changed = {}
    for position, neurons in pruned.items():
        for member in groups[position].of_role(CONSUMER):
            name = tensor_name(member.name, "weight")
            weight = masked.get(name, weight_of(member.module))
            changed[name] = masked[name] = without_columns(member.module, weight, member.index[neurons].flatten())
    return changed


def without_columns(module: nn.Module, weight: Tensor, inputs: Tensor) -> Tensor:
    """A copy of a layer's weight with zeros where it reads the input channels `inputs` [m]."""
    masked = weight.detach().clone()
    inputs = inputs.to(masked.device)
    if is_transposed(module):
        masked[inputs] = 0
        return masked
    size = inputs_of_group(module)
    columns = masked.unflatten(0, (groups_of(module), -1)).transpose(1, 2)  # a view [groups, columns, rows, ...]
    columns[inputs // size, inputs % size] = 0
    return masked


@contextmanager
def survivors_only(cuts: Iterable[LayerCut]) -> Iterator[None]:
    """Layer norms and group norms give zeros for the channels to be cut and take statistics over the others."""
    with ExitStack() as stack:
        for cut in cuts:
            if isinstance(cut.module, JOINT_NORMS) and cut.outputs is not None:
                stack.enter_context(cut.module.register_forward_hook(_survivor_norm(cut.module, cut.outputs)))
        yield


def _survivor_norm(norm: nn.LayerNorm | nn.GroupNorm, kept: Tensor) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x, axis = args[0], (output.dim() - 1 if isinstance(norm, nn.LayerNorm) else 1)
        shape = [-1 if d == axis else 1 for d in range(x.dim())]
        stay = torch.zeros(x.shape[axis], dtype=x.dtype, device=x.device)
        stay = stay.index_fill(0, kept.to(x.device), 1.0).view(shape)
        rows, alive = _statistics_rows(norm, x), _statistics_rows(norm, stay.expand_as(x))
        count = alive.sum(dim=-1, keepdim=True).clamp_min(1)
        mean = (alive * rows).sum(dim=-1, keepdim=True) / count
        variance = (alive * (rows - mean).square()).sum(dim=-1, keepdim=True) / count
        values = ((rows - mean) * (variance + norm.eps).rsqrt()).view(x.shape)
        weight, bias = (t if t is None else t.view(shape) for t in (module.weight, module.bias))  # type: ignore[operator]
        values = values if weight is None else values * weight
        return stay * (values if bias is None else values + bias)

    return hook


def _statistics_rows(norm: nn.LayerNorm | nn.GroupNorm, x: Tensor) -> Tensor:
    """x [..., entries that share a mean and a variance]."""
    return x if isinstance(norm, nn.LayerNorm) else x.reshape(len(x), norm.num_groups, -1)


@contextmanager
def _trial_attributes(cuts: Iterable[LayerCut]) -> Iterator[None]:
    """The layers have the attributes they would have after the cuts."""
    after = [(cut.module, key, value) for cut in cuts for key, value in cut.attributes().items()]
    before = [(module, key, getattr(module, key)) for module, key, _ in after]
    try:
        for module, key, value in after:
            setattr(module, key, value)
        yield
    finally:
        for module, key, value in before:
            setattr(module, key, value)


def _leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value if value.is_floating_point() else value.double()]
    if isinstance(value, Mapping):
        value = value.values()
    return [tensor for item in value for tensor in _leaves(item)] if isinstance(value, Iterable) else []


def is_float(value: Any) -> bool:
    """Whether something is a tensor of floating-point numbers."""
    return isinstance(value, Tensor) and value.is_floating_point()
