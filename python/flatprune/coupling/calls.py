"""Calls that leave a model as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from kfac_ext.curvature.modes import RngState, device_of, module_modes, put_back

_NEW = object()
_PLAIN = (bool, int, float, str, type(None))


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Forwards inside leave buffers, cached tensors and all random streams as they were; there are no gradients."""
    rng, python_state = RngState.now(device_of(model)), random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002
    buffers = [(module, key, b, b._version, b.clone()) for module in model.modules() for key, b in _buffers(module)]
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    try:
        with torch.no_grad():
            yield
    finally:
        torch.clear_autocast_cache()  # of casts without gradients, which torch 2.6 would take for others
        rng.restore()
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
        for module, key, buffer, version, copy in buffers:
            module._buffers[key] = buffer
            put_back(buffer, version, copy)
        for module, known in attributes:
            changed = {key: value for key, value in vars(module).items() if known.get(key, _NEW) is not value}
            cached = {key for key, value in changed.items() if _holds_tensors(value)}
            for key, value in changed.items():
                if key in known and (cached or isinstance(value, _PLAIN)):  # a cache and what it is of, or a counter
                    module.__dict__[key] = known[key]
                elif key not in known and cached:
                    del module.__dict__[key]


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def _buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(key, buffer) for key, buffer in module._buffers.items() if buffer is not None]


@contextmanager
def traced_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Evaluation or training mode; batch norms normalise by running statistics in both, so that one sample will do."""
    modes = {
        module: training and not (isinstance(module, _BatchNorm) and module.running_var is not None)
        for module in model.modules()
    }
    with module_modes(modes):
        yield


def first_lines(error: BaseException, length: int = 160) -> str:
    """An exception in a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:length] if text else type(error).__name__
