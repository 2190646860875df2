"""What a network weighs: its parameters, its operations, its widths."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from kfac_ext.layers.convolution import TRANSPOSED

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
def multiply_accumulates(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Multiply-accumulate operations of the linear and convolution layers for one image (twice that many FLOPs).

    Counted by forward hooks: weight elements times the positions they are applied at, which are those of the output,
    or of the input of a transposed convolution; so a grouped convolution counts what it does. As usual in the field,
    nothing else counts: not norms, not activations, and not the two products of an attention between its own inputs.
    """
    total = 0

    def count(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        nonlocal total
        at = args[0] if isinstance(module, TRANSPOSED) else output
        channels = at.shape[-1] if isinstance(module, nn.Linear) else at.shape[1]
        total += cast(Tensor, module.weight).numel() * (at.numel() // channels)

    layers = [module for module in model.modules() if isinstance(module, LAYERS)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    training = model.training
    try:
        model.eval()
        parameter = next(model.parameters())
        model(torch.zeros(1, *image_shape, device=parameter.device, dtype=parameter.dtype))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return total
