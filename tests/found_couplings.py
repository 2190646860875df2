"""The couplings that pruners found, kept: the same network is not traced and tried again in every test."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor, nn

import flatprune.pruning.pruner
from flatprune.coupling import Coupling, find_coupling
from kfac_ext.curvature.capture import ForwardHook

_FOUND: dict[Hashable, Coupling] = {}
_PLAIN = (bool, int, float, str, tuple, type(None))


@contextmanager
def couplings_are_kept() -> Iterator[None]:
    """`Pruner` finds the coupling of equal networks once; tests that call `find_coupling` are not touched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flatprune.pruning.pruner, "find_coupling", _kept)
        yield


def _kept(model: nn.Module, example_inputs: Any, exclude: Any = ()) -> Coupling:
    key = _key(model, example_inputs, exclude)
    if key is None:
        return find_coupling(model, example_inputs, exclude)
    if key not in _FOUND:
        _FOUND[key] = find_coupling(model, example_inputs, exclude)
    return copy.deepcopy(_FOUND[key])


def _key(model: nn.Module, example_inputs: Any, exclude: Any) -> Hashable | None:
    """All that a coupling depends on; None of what is out of the ordinary: hooks, inputs, buffers of indices."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    modules = [*model.named_modules(remove_duplicate=False)]
    if not isinstance(example_inputs, Tensor) or not example_inputs.is_floating_point():
        return None
    hooks = [hook for _, m in modules for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    if not all(isinstance(hook, ForwardHook) for hook in hooks):
        return None
    if any(isinstance(module, nn.MultiheadAttention) for _, module in modules):  # gets another forward
        return None
    if any(not t.is_floating_point() and t.dim() for _, t in tensors):
        return None
    first = {id(tensor): name for name, tensor in reversed(tensors)}  # which are one tensor
    return (
        tuple((name, type(module), repr(module), _settings(module)) for name, module in modules),
        tuple((name, first[id(t)], t.shape, t.dtype, t.device, t.requires_grad) for name, t in tensors),
        (example_inputs.shape, example_inputs.dtype),
        repr(exclude),
    )


def _settings(module: nn.Module) -> tuple[tuple[str, str], ...]:
    return tuple((name, repr(value)) for name, value in sorted(vars(module).items()) if isinstance(value, _PLAIN))
