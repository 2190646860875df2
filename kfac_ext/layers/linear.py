"""Linear layers: inputs and outputs are the last dimension, everything between it and the samples are positions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from kfac_ext.layers.layer import Layer, register
from kfac_ext.ops.covariance_group import CovarianceUpdate


@register(nn.Linear)
class Linear(Layer):
    """z = W a + b with a weight [O, d], on x [N, ..., d]."""

    channel_dim = -1

    def input_update(self, x: Tensor, mode: str, *, bias: bool, decay: float, scale: float) -> CovarianceUpdate:
        """Rows of x; in mode reduce their means over positions."""
        rows = self.mean_rows(x) if mode == "reduce" and x.dim() > 2 else x
        return CovarianceUpdate.linear(f"{self.name}.A", rows, bias=bias, decay=decay, scale=scale)

    def gradient_update(self, g: Tensor, mode: str, *, decay: float, scale: float) -> CovarianceUpdate:
        """Rows of g; in mode reduce their sums over positions."""
        rows = self.gradient_rows(g)
        g = rows.sum(dim=1) if mode == "reduce" else rows.flatten(0, 1)
        return CovarianceUpdate.gradient(f"{self.name}.G", g, mode=mode, decay=decay, scale=scale * len(g))

    def position_count(self, x: Tensor) -> int:
        """Everything between samples and features."""
        return x[0].numel() // x.shape[-1]

    def mean_rows(self, x: Tensor) -> Tensor:
        """[N, d]."""
        return x.flatten(1, -2).mean(dim=1) if x.dim() > 2 else x

    def input_rows(self, x: Tensor) -> Tensor:
        """[N, positions, d]."""
        return x.reshape(len(x), -1, x.shape[-1])

    def gradient_rows(self, g: Tensor) -> Tensor:
        """[N, positions, O]."""
        g = g if g.dim() > 1 else g[None]
        return g.reshape(len(g), -1, g.shape[-1])

    def projected(self, x: Tensor, filters: Tensor) -> Tensor:
        """[N, positions, 1]."""
        return F.linear(x.reshape(len(x), -1, x.shape[-1]), filters.to(x.dtype))

    def projected_sum(self, x: Tensor, filters: Tensor) -> Tensor:
        """[N, 1]."""
        return F.linear(x.reshape(len(x), -1, x.shape[-1]).sum(dim=1), filters.to(x.dtype))


class InputMajorLinear(Linear):
    """z = a W + b with a weight [d, O], as `torch.matmul` and `torch.addmm` take it."""

    output_dim, input_dim = 1, 0

    def weight_matrix(self, tensor: Tensor | None = None) -> Tensor:
        """The transpose."""
        return (self.weight if tensor is None else tensor).T

    def weight_like(self, matrix: Tensor) -> Tensor:
        """The transpose."""
        return matrix.T.contiguous()
