"""The covariance on a GPU: A and G of a whole network as a running average, native and as PyTorch users write it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

import kfac_ext
from bench import baselines, worksets
from bench.check import relative_error
from bench.gpu.counts import covariance_floor
from bench.timing import Variant
from bench.worksets import LayerShape
from kfac_ext import CovarianceUpdate, FactorSet

DECAY, SCALE = 0.95, 0.05
_LARGEST_CHECKED = 1200


class Covariances:
    """A and G of all layers as a running average."""

    def __init__(self, layers: Sequence[LayerShape], device: torch.device) -> None:
        self.layers = layers
        self.x = [worksets.activation(layer, device) for layer in layers]
        self.g = [worksets.gradient(layer, device) for layer in layers]
        self.halves = [(x.bfloat16(), g.bfloat16()) for x, g in zip(self.x, self.g)]
        sizes = {f"{layer.name}.A": layer.patch for layer in layers} | {f"{i.name}.G": i.outputs for i in layers}
        self.factors = FactorSet(sizes, device=device)
        # the plain way: 2 rows d^2 for each A and G; inputs are read, factors read and written once
        rows = [layer.batch * layer.output_size**2 for layer in layers]
        self.flops = float(sum(2 * r * (i.patch**2 + i.outputs**2) for r, i in zip(rows, layers)))
        self.bytes = float(sum(t.nbytes for t in (*self.x, *self.g)) + 2 * self.factors.buffer.nbytes)
        self.floor = covariance_floor(layers)

    def updates(self, inputs: Iterable[tuple[Tensor, Tensor]] | None = None) -> list[CovarianceUpdate]:
        """A and G of all layers, of other inputs and gradients than its own where these are given."""
        weights = {"decay": DECAY, "scale": SCALE}
        found = []
        for layer, (x, g) in zip(self.layers, inputs or zip(self.x, self.g)):
            if layer.is_convolution:
                found.append(CovarianceUpdate.conv2d(f"{layer.name}.A", x, layer.kernel, **layer.geometry, **weights))
            else:
                found.append(CovarianceUpdate.linear(f"{layer.name}.A", x, **weights))
            found.append(CovarianceUpdate.gradient(f"{layer.name}.G", g, **weights))
        return found

    def variants(self) -> dict[str, Variant]:
        """One call for all layers, also of what autocast leaves, and layer by layer in two ways."""
        return {
            "native": lambda: self.factors.accumulate_(self.updates()),
            "native of bf16": lambda: self.factors.accumulate_(self.updates(self.halves)),
            "strided unfold": lambda: self._plain(baselines.by_strides),
            "conv2d_weight": lambda: self._plain(baselines.by_shifts),
        }

    def _plain(self, method: Callable[[Tensor, LayerShape], Tensor]) -> None:
        """A by `method`, G by one matmul."""
        for layer, x, g in zip(self.layers, self.x, self.g):
            baselines.blend_(self.factors[f"{layer.name}.A"], method(x, layer), DECAY, SCALE)
            baselines.blend_(self.factors[f"{layer.name}.G"], baselines.gradient_covariance(g), DECAY, SCALE)

    def error(self) -> float:
        """Worst relative error of a native factor against float64, among those of at most 1200 rows."""
        errors = [0.0]
        for update in self.updates():
            n = self.factors[update.key].shape[-1]
            if n > _LARGEST_CHECKED:
                continue
            value, exact = (
                FactorSet({update.key: n}, dtype=t, device=update.x.device) for t in (torch.float32, torch.float64)
            )
            value.accumulate_([update._replace(decay=0.0)])
            with kfac_ext.use_native(False):
                exact.accumulate_([update._replace(decay=0.0, x=update.x.double())])
            errors.append(relative_error(value[update.key], exact[update.key]))
        return max(errors)
