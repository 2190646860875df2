"""The covariance on a GPU: A and G of a whole network as a running average, native and as PyTorch users write it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import kfac_ext
from bench import baselines
from bench.worksets import LayerShape
from kfac_ext import CovarianceUpdate, FactorSet

DECAY, SCALE = 0.95, 0.05


class Work:
    """Random inputs and output gradients of every layer, and the factors they go into."""

    def __init__(self, layers: Sequence[LayerShape], device: torch.device) -> None:
        self.layers = layers
        self.x = [torch.randn(layer.batch, layer.channels, *_side(layer.size), device=device) for layer in layers]
        self.g = [torch.randn(layer.batch, layer.outputs, *_output_side(layer), device=device) for layer in layers]
        sizes = {f"{layer.name}.A": layer.patch for layer in layers} | {f"{i.name}.G": i.outputs for i in layers}
        self.factors = FactorSet(sizes, device=device)

    def updates(self) -> list[CovarianceUpdate]:
        """A and G of all layers."""
        weights = {"decay": DECAY, "scale": SCALE}
        found = []
        for layer, x, g in zip(self.layers, self.x, self.g):
            if layer.is_convolution:
                found.append(CovarianceUpdate.conv2d(f"{layer.name}.A", x, layer.kernel, **layer.geometry, **weights))
            else:
                found.append(CovarianceUpdate.linear(f"{layer.name}.A", x, **weights))
            found.append(CovarianceUpdate.gradient(f"{layer.name}.G", g, **weights))
        return found

    def native(self) -> None:
        """One call for all layers."""
        self.factors.accumulate_(self.updates())

    def plain(self, method: Callable[[Tensor, LayerShape], Tensor]) -> None:
        """Layer by layer: A by `method`, G by one matmul."""
        for layer, x, g in zip(self.layers, self.x, self.g):
            A = method(x, layer) if layer.is_convolution else baselines.rows_covariance(x)
            baselines.blend_(self.factors[f"{layer.name}.A"], A, DECAY, SCALE)
            baselines.blend_(self.factors[f"{layer.name}.G"], baselines.gradient_covariance(g), DECAY, SCALE)


def _side(size: int) -> tuple[int, ...]:
    return (size, size) if size else ()


def _output_side(layer: LayerShape) -> tuple[int, ...]:
    return _side(layer.output_size if layer.is_convolution else 0)


def weight_gradient_covariance(x: Tensor, layer: LayerShape) -> Tensor:
    """Stride 1: all shifts at once, as the gradient of a convolution's weight; else `strided_covariance`.

    R[s] = sum over n, u of x[n, c, u] x[n, c', u + s] for all (2k - 1)^2 shifts s is conv2d_weight of x with itself.
    Block (p, q) is R[q - p] less the terms whose u lies outside p's window: up to four strips along the border.
    """
    if layer.stride > 1 or layer.kernel == 1 or layer.groups > 1:
        return baselines.strided_covariance(x, layer)
    n, c, height, width = x.shape
    k, pad, reach, out = layer.kernel, layer.padding, layer.kernel - 1, layer.output_size
    padded = F.pad(x, (reach,) * 4)
    shifts = torch.nn.grad.conv2d_weight(x, (c, c, 2 * k - 1, 2 * k - 1), x, padding=reach)
    result = x.new_empty(c, k, k, c, k, k)
    for py in range(k):
        for px in range(k):
            y, z = reach - py, reach - px
            block = shifts[:, :, y : y + k, z : z + k]
            top, bottom = max(py - pad, 0), min(py - pad + out, height)
            left, right = max(px - pad, 0), min(px - pad + out, width)
            strips = [
                (0, top, 0, width),
                (bottom, height, 0, width),
                (top, bottom, 0, left),
                (top, bottom, right, width),
            ]
            for y0, y1, x0, x1 in strips:
                if y0 < y1 and x0 < x1:
                    seen = padded[:, :, y0 + y : y1 + y + reach, x0 + z : x1 + z + reach]
                    block = block - torch.nn.grad.conv2d_weight(seen, (c, c, k, k), x[:, :, y0:y1, x0:x1])
            result[:, py, px] = block
    return result.view(c * k * k, -1) / (n * out * out)


def variants(work: Work) -> dict[str, Callable[[], None]]:
    """Native and the baselines on the same inputs."""
    return {
        "native": work.native,
        "strided unfold": lambda: work.plain(baselines.strided_covariance),
        "conv2d_weight": lambda: work.plain(weight_gradient_covariance),
    }


def worst_error(work: Work, largest: int = 1200) -> float:
    """The largest relative error of a native factor against float64, among those of at most `largest` rows."""
    errors = [0.0]
    for update in work.updates():
        n = work.factors[update.key].shape[-1]
        if n > largest:
            continue
        value, exact = (
            FactorSet({update.key: n}, dtype=t, device=update.x.device) for t in (torch.float32, torch.float64)
        )
        value.accumulate_([update._replace(decay=0.0)])
        with kfac_ext.use_native(False):
            exact.accumulate_([update._replace(decay=0.0, x=update.x.double())])
        errors.append(float((value[update.key] - exact[update.key]).norm() / exact[update.key].norm()))
    return max(errors)


def products(layers: Sequence[LayerShape]) -> float:
    """Floating point operations of the plain way, 2 rows d^2 for each A and G."""
    rows = [layer.batch * layer.output_size**2 for layer in layers]
    return float(sum(2 * r * (i.patch**2 + i.outputs**2) for r, i in zip(rows, layers)))
