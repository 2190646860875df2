"""Steps of a copy of an optimizer on stand-ins: which states it will keep, before the first one is made.

A stand-in has the dimensions of a parameter, all of different sizes, so that the shape of a state says along which of
them it lies: of a weight [8, 8] a state [8] may be a row's or a column's, and a preconditioner [8, 8] looks like a
momentum; of a stand-in [8, 9] they are [8], [9] and [8, 8].
"""

from __future__ import annotations

import copy
import types
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatprune.cutting.layouts import Layout, NotCuttableError, chosen_layout, refusal, tensors_in
from kfac_ext.curvature.modes import RngState

# (id of the optimizer, dimensions of the parameter, path of a state) -> how it lay along stand-ins
Seen = dict[tuple[int, int, str], set[Layout]]

_LARGEST = 256  # size of a stand-in's dimension; from 4,096 entries on quantised optimizers quantise
_STEPS = 2


def rehearse(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], seen: Seen) -> None:
    """Take two steps on stand-ins of those parameters that the optimizer holds, and note how their states lie.

    An optimizer that cannot be copied, or whose step raises on stand-ins, is left to be judged by the states that it
    makes. Random streams and the optimizer are as before.

    Args:
        optimizer: any; its own state, hooks and parameters are not touched.
        parameters: name -> parameter that is going to be cut.
        seen: gets the layouts.

    Raises:
        ValueError: a state of a stand-in cannot be cut; names the parameter, the state and the optimizer.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    groups: list[list[tuple[str, nn.Parameter]]] = []
    for group in optimizer.param_groups:
        chosen: dict[object, tuple[str, nn.Parameter]] = {}
        for parameter in group["params"]:
            if id(parameter) in names:
                shape = _distinct(parameter.shape)
                key = (shape, parameter.dtype, parameter.device)
                if key not in chosen:
                    chosen[key] = (names[id(parameter)], _stand_in(parameter, shape))
        groups.append(list(chosen.values()))
    if not any(groups):
        return
    first = next(stand_in for group in groups for _, stand_in in group)
    rng = RngState.now(first.device)
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            states = _states_after_steps(optimizer, [[stand_in for _, stand_in in group] for group in groups])
    except Exception:
        return
    finally:
        rng.restore()
    for name, stand_in in (pair for group in groups for pair in group):
        _note(seen, id(optimizer), type(optimizer).__name__, name, stand_in, states.get(stand_in, {}))


def _distinct(shape: Sequence[int]) -> tuple[int, ...]:
    """Sizes that differ from each other, none much above the largest; those of 1 stay."""
    sizes: list[int] = []
    for size in shape:
        size = min(size, _LARGEST)
        while size > 1 and size in sizes:
            size += 1
        sizes.append(size)
    return tuple(sizes)


def _stand_in(parameter: Tensor, shape: tuple[int, ...]) -> nn.Parameter:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator).to(parameter.device, parameter.dtype)
    return nn.Parameter(values)


def _states_after_steps(optimizer: Any, groups: Sequence[Sequence[nn.Parameter]]) -> Mapping[Any, Any]:
    """The state of a copy of the optimizer that holds the stand-ins instead of its parameters."""
    double = object.__new__(type(optimizer))
    memo: dict[int, Any] = {id(optimizer): double}
    stand_ins = [stand_in for group in groups for stand_in in group]
    for group, own in zip(groups, optimizer.param_groups):
        for parameter in own["params"]:
            alike = [s for s in group if _distinct(parameter.shape) == s.shape and s.dtype == parameter.dtype]
            memo[id(parameter)] = (alike or group or stand_ins)[0]
    kept = {key: value for key, value in vars(optimizer).items() if key not in ("state", "param_groups", "step")}
    hooks = [key for key in kept if key.startswith("_optimizer_")]
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    _refuse_closures([value for key, value in kept.items() if key not in hooks])
    copied, options = copy.deepcopy(({k: v for k, v in kept.items() if k not in hooks}, options), memo)
    vars(double).update(copied)
    vars(double).update({key: type(kept[key])() for key in hooks})
    double.state = defaultdict(dict)
    double.param_groups = [{"params": list(group), **rest} for group, rest in zip(groups, options) if group]
    step = type(optimizer).step
    step = getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step  # no hooks of the user's
    for _ in range(_STEPS):
        _gradients(stand_ins)
        try:
            step(double)
        except Exception:
            step(double, lambda: _gradients(stand_ins))
    return double.state


def _refuse_closures(values: Sequence[Any]) -> None:
    """Functions that hold on to the optimizer itself would act on it, not on the copy."""
    for value in values:
        if isinstance(value, types.FunctionType) and value.__closure__:
            raise NotCuttableError("a function with a closure cannot be copied")


def _gradients(stand_ins: Sequence[nn.Parameter]) -> Tensor:
    """The loss of a closure, and its gradients in the stand-ins: of all entries, none of them alike."""
    loss = torch.zeros(())
    for stand_in in stand_ins:
        stand_in.grad = None
        values = stand_in.float()
        loss = loss + (values.sin() * (values + 0.5)).sum().cpu()
    loss.backward()
    return loss


def _note(seen: Seen, optimizer: int, kind: str, name: str, stand_in: Tensor, state: Mapping[Any, Any]) -> None:
    shape = tuple(stand_in.shape)
    for key, entry in state.items():
        for path, leaf in tensors_in(entry):
            try:
                layout = chosen_layout(leaf, shape, range(len(shape)))
            except NotCuttableError as error:
                raise refusal(name, f"state {key!r} of {kind}, of a stand-in of shape {shape},", error) from error
            seen.setdefault((optimizer, len(shape), f"[{key!r}]{path}"), set()).add(layout)
