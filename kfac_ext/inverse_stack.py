"""Damped inverses of Kronecker factors, stacked over layers of one shape: a direction is two batched products."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from kfac_ext.factors import FactorSet
from kfac_ext.layers import Layer
from kfac_ext.ops._launch import without_autocast


class InverseStack:
    """A^-1 [B, d, d] and G^-1 [B, o, o] of layers whose blocks are all [o, d]; B counts each group of each layer.

    A bias is the last of the d columns. Until inverses are taken they are identities.

    Args:
        layers: of equal `block_shape`.
        factors: whose dtype and device the inverses have.
    """

    def __init__(self, layers: Sequence[Layer], factors: FactorSet) -> None:
        self.layers = list(layers)
        outputs, inputs = block_shape(layers[0])
        self._slices: dict[str, slice] = {}
        self.blocks = 0
        for layer in layers:
            self._slices[layer.name] = slice(self.blocks, self.blocks + layer.groups)
            self.blocks += layer.groups
        dtype, device = factors.buffer.dtype, factors.buffer.device
        self._A = torch.eye(inputs, dtype=dtype, device=device).repeat(self.blocks, 1, 1)
        self._G = torch.eye(outputs, dtype=dtype, device=device).repeat(self.blocks, 1, 1)

    def inverses(self, layers: Sequence[Layer]) -> tuple[Tensor, Tensor]:
        """(A^-1, G^-1) of the blocks of some of the layers, in the stack's order."""
        if len(layers) == len(self.layers):
            return self._A, self._G
        places = [self._slices[layer.name] for layer in layers]
        return torch.cat([self._A[place] for place in places]), torch.cat([self._G[place] for place in places])

    def take_(self, inverses: FactorSet, failed: Tensor) -> None:
        """Take over the inverses `name.A`, `name.G`, but not of blocks that `failed` [B]."""
        keep = failed[:, None, None]
        new_A, new_G = (
            torch.cat([inverses[f"{layer.name}.{kind}"].view(layer.groups, *old.shape[1:]) for layer in self.layers])
            for kind, old in (("A", self._A), ("G", self._G))
        )
        self._A, self._G = torch.where(keep, self._A, new_A), torch.where(keep, self._G, new_G)

    def gradients(self, layers: Sequence[Layer]) -> Tensor:
        """dL/d[W, b] of these layers as blocks [B, o, d], in the dtype of the inverses."""
        return torch.cat([_gradient(layer).to(self._A.dtype) for layer in layers])

    def directions(self, layers: Sequence[Layer], gradients: Tensor) -> Tensor:
        """G^-1 M A^-1 of every block M of `gradients` [B, o, d] of these layers."""
        A_inverse, G_inverse = self.inverses(layers)
        with without_autocast(gradients.device):
            return G_inverse @ gradients @ A_inverse

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Layer's name -> "A_inverse" and "G_inverse", each [groups, n, n], copied."""
        return {
            name: {"A_inverse": self._A[place].clone(), "G_inverse": self._G[place].clone()}
            for name, place in self._slices.items()
        }

    def load_(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over the inverses of the layers that `state` has."""
        for name, place in self._slices.items():
            if "A_inverse" in state.get(name, ()):
                self._A[place] = state[name]["A_inverse"].to(self._A)
                self._G[place] = state[name]["G_inverse"].to(self._G)


def block_shape(layer: Layer) -> tuple[int, int]:
    """(o, d): outputs of one group, and its inputs with the bias."""
    return layer.outputs // layer.groups, layer.patch_size + layer.constant


def stack_layers(layers: Iterable[Layer], factors: FactorSet) -> list[InverseStack]:
    """The fewest stacks that hold all layers."""
    by_shape: dict[tuple[int, int], list[Layer]] = {}
    for layer in layers:
        by_shape.setdefault(block_shape(layer), []).append(layer)
    return [InverseStack(group, factors) for group in by_shape.values()]


def write_gradients_(layers: Sequence[Layer], blocks: Tensor) -> None:
    """Split blocks [B, o, d] back into the `.grad` of each layer's weight and bias."""
    targets, values = [], []
    for layer, block in zip(layers, blocks.split([layer.groups for layer in layers])):
        matrix = block.flatten(0, 1)
        weight, bias = _parameter_gradients(layer)
        targets.append(weight)
        values.append(layer.weight_like(matrix[:, : layer.patch_size]))
        if bias is not None:
            targets.append(bias)
            values.append(matrix[:, -1])
    torch._foreach_copy_(targets, values)


def _gradient(layer: Layer) -> Tensor:
    """[groups, o, d]."""
    weight, bias = _parameter_gradients(layer)
    matrix = layer.weight_matrix(weight)
    if bias is not None:
        matrix = torch.cat([matrix, bias[:, None]], dim=1)
    return matrix.reshape(layer.groups, -1, matrix.shape[1])


def _parameter_gradients(layer: Layer) -> tuple[Tensor, Tensor | None]:
    """The `.grad` of weight and bias, which must be there."""
    weight, bias = layer.weight.grad, layer.bias
    assert weight is not None and (bias is None or bias.grad is not None)
    return weight, None if bias is None else bias.grad
