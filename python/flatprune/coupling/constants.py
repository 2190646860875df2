"""Tensors that modules hold as plain attributes: fixed positions of a transformer that nobody registered as a buffer.

Where they have an entry for each channel of a residual stream, they are cut with it. So they become buffers, which a
state dict leaves out, as it left out the attribute.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn


def register_tensors(model: nn.Module, wanted: Collection[str] | None = None) -> list[tuple[nn.Module, str]]:
    """Make buffers of the floating tensors that modules hold as plain attributes.

    Args:
        model: changed in place; what it computes and its state dict are not.
        wanted: qualified names; None for all.

    Returns:
        (module, attribute) of each, for `unregister_tensors`.
    """
    found = []
    for name, module in model.named_modules():
        for key, value in list(vars(module).items()):
            qualified = f"{name}.{key}".lstrip(".")
            if not _is_constant(value) or hasattr(type(module), key):  # its class would hide a buffer of that name
                continue
            if wanted is None or qualified in wanted:
                del module.__dict__[key]
                module.register_buffer(key, value, persistent=False)
                found.append((module, key))
    return found


def unregister_tensors(registered: list[tuple[nn.Module, str]]) -> None:
    """Make plain attributes of them again."""
    for module, key in registered:
        value = module._buffers.pop(key)
        module._non_persistent_buffers_set.discard(key)
        module.__dict__[key] = value


def _is_constant(value: object) -> bool:
    plain = type(value) is Tensor and value.is_floating_point() and value.dim() > 0
    return plain and not value.requires_grad and value.layout == torch.strided  # type: ignore[attr-defined]
