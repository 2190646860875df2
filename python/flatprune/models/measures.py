"""What a network weighs: its parameters, its operations, its widths."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode

from kfac_ext.curvature.modes import module_modes, plain_kernels

LAYERS = (nn.Linear, _ConvNd)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any layer of the model is a batch norm."""
    return any(isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) for module in model.modules())


def layer_widths(model: nn.Module) -> dict[str, int]:
    """Name -> output channels or features of every linear and convolution layer."""
    return {
        name: int(module.out_features if isinstance(module, nn.Linear) else module.out_channels)
        for name, module in model.named_modules()
        if isinstance(module, LAYERS)
    }


def parameter_count(model: nn.Module) -> int:
    """Number of trainable scalars (batch norm's running statistics are not among them)."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def multiply_accumulates(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Multiply-accumulates of one call in evaluation mode: half the FLOPs that PyTorch's own counter finds.

    Matrix products and convolutions, among them the two products of an attention between its own inputs; as usual in
    the field, norms, activations and sums count nothing. A grouped convolution counts what it does.

    Args:
        model: its modes stay as they are.
        args: what it is called with, one sample for the usual figure.
        kwargs: likewise.

    Example:
        >>> multiply_accumulates(nn.Linear(4, 8), torch.zeros(1, 4))
        32
    """
    with _counting(model) as counter:
        model(*args, **kwargs)
    return counter.get_total_flops() // 2


@torch.no_grad()
def module_macs(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, int]:
    """Name -> the multiply-accumulates that each module makes itself, without those of modules that it calls.

    Example:
        >>> module_macs(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), torch.zeros(1, 4))
        {'0': 32}
    """
    made: dict[str, int] = {}
    inside = [0]  # FLOPs of what the module in hand has called, and of those around it

    with _counting(model) as counter, contextlib.ExitStack() as hooks:
        begun: list[int] = []

        def enter(*_: Any) -> None:
            begun.append(counter.get_total_flops())
            inside.append(0)

        def leave(name: str, *_: Any) -> None:
            whole, called = counter.get_total_flops() - begun.pop(), inside.pop()
            inside[-1] += whole
            if whole > called:
                made[name] = made.get(name, 0) + (whole - called) // 2

        for name, module in model.named_modules():
            hooks.callback(module.register_forward_pre_hook(enter).remove)
            hooks.callback(module.register_forward_hook(functools.partial(leave, name)).remove)
        model(*args, **kwargs)
    return made


@contextlib.contextmanager
def _counting(model: nn.Module) -> Iterator[FlopCounterMode]:
    evaluating = module_modes(dict.fromkeys(model.modules(), False))
    with evaluating, plain_kernels(), FlopCounterMode(display=False, custom_mapping=_MORE) as counter:
        yield counter


def _flops_by_vector(*shapes: Sequence[int], **_options: Any) -> int:
    return 2 * max(map(math.prod, shapes))  # the matrix is the largest


def _flops_of_experts(rows: Sequence[int], matrices: Sequence[int], *_rest: Any, **_options: Any) -> int:
    return 2 * math.prod(rows) * matrices[-1]


# what torch's counter leaves out: products with a vector, rows that each meet the matrix of their expert
_MORE: dict[Any, Any] = {getattr(torch.ops.aten, name): _flops_by_vector for name in ("mv", "addmv", "dot", "vdot")}
if hasattr(torch.ops.aten, "_grouped_mm"):
    _MORE[torch.ops.aten._grouped_mm] = _flops_of_experts
