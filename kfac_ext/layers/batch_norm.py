"""Batch norms behind a layer: in evaluation mode an affine map of each channel, which is folded into the layer."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

BatchNorm: TypeAlias = "nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d"

_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether the module's forward is torch's own: a subclass may do more, such as an activation, in its own."""
    return isinstance(module, _BatchNorm) and type(module).forward in _FORWARDS and "forward" not in vars(module)


def can_be_folded(module: nn.Module) -> bool:
    """Whether it is an affine map in evaluation mode: a batch norm with running statistics."""
    return is_batch_norm(module) and isinstance(module.running_var, Tensor)


def norm_affine(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """(s, t) of the batch norm in eval mode, x -> s x + t."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    offset = -norm.running_mean * scale
    return scale, offset if norm.bias is None else offset + norm.bias
