"""Inverses, power iteration and scores of a whole network on a GPU, native and as PyTorch users write them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import kfac_ext
from bench import baselines, worksets
from bench.check import worst_error
from bench.gpu.counts import free_floor, inverse_floor, power_floor, saliency_floor
from bench.timing import Variant
from bench.worksets import LayerShape
from kfac_ext import reference
from kfac_ext.reference.power import start_vector

DAMPING, STEPS = 1e-2, 8
LARGEST_CHECKED = 1200  # rows of a matrix that is compared with float64


def factor(n: int, device: torch.device) -> Tensor:
    """A covariance of n features whose eigenvalues fall as those of layers do."""
    rows = min(2 * n, 512)
    x = torch.randn(rows, n, device=device) * torch.arange(1, n + 1, device=device).pow(-0.5) + 0.1
    return x.mT @ x / rows


def factors(layers: Sequence[LayerShape], device: torch.device) -> list[Tensor]:
    """A and G of every layer, [A0, G0, A1, ...]."""
    return [factor(n, device) for layer in layers for n in (layer.patch, layer.outputs)]


class Inverses:
    """Damped inverses of all factors."""

    def __init__(self, layers: Sequence[LayerShape], device: torch.device) -> None:
        self.matrices = factors(layers, device)
        sizes = [len(m) for m in self.matrices]
        # Cholesky and the inverse from it; each matrix is read and written once
        self.flops, self.bytes = float(sum(n**3 for n in sizes)), float(sum(8 * n * n for n in sizes))
        self.floor = inverse_floor(layers)

    def variants(self) -> dict[str, Variant]:
        """Native, without waiting for info, and Cholesky one by one."""
        return {
            "native": lambda: kfac_ext.damped_inverse_ex(self.matrices, DAMPING),
            "cholesky": lambda: baselines.cholesky_inverses(self.matrices, DAMPING),
        }

    def error(self) -> float:
        """Worst relative error of native against float64."""
        few = [m for m in self.matrices if len(m) <= LARGEST_CHECKED]
        inverses, _ = kfac_ext.damped_inverse_ex(few, DAMPING)
        return worst_error(inverses, baselines.linalg_inverses([m.double() for m in few], DAMPING))


class PowerIterations:
    """Eight steps of power iteration with all factors."""

    def __init__(self, layers: Sequence[LayerShape], device: torch.device) -> None:
        self.matrices = factors(layers, device)
        self.vectors = [start_vector(len(m), m.dtype, device) for m in self.matrices]
        entries = sum(len(m) ** 2 for m in self.matrices)
        self.flops, self.bytes = 2.0 * STEPS * entries, 4.0 * STEPS * entries  # read at every step
        self.floor = power_floor(layers, STEPS)

    def variants(self) -> dict[str, Variant]:
        """Native, a loop that tests the residual as one does, and one that only multiplies."""
        return {
            "native": lambda: self._native(self.matrices, self.vectors),
            "loop": lambda: baselines.power_loop(self.matrices, self.vectors, 0.0, STEPS),
            "loop without test": lambda: baselines.power_steps(self.matrices, self.vectors, STEPS),
        }

    def _native(self, matrices: list[Tensor], vectors: list[Tensor]) -> Tensor:
        return kfac_ext.power_iteration(matrices, vectors, tol=0.0, max_iter=STEPS).eigenvalues

    def error(self) -> float:
        """Worst relative error of native's eigenvalues against float64."""
        few = [(m, v) for m, v in zip(self.matrices, self.vectors) if len(m) <= LARGEST_CHECKED]
        exact = baselines.power_steps([m.double() for m, _ in few], [v.double() for _, v in few], STEPS)
        return worst_error(list(self._native(*map(list, zip(*few)))), exact)


class MatrixFree:
    """Eight steps with A of each layer's input, never formed."""

    def __init__(self, layers: Sequence[LayerShape], device: torch.device) -> None:
        self.layers = layers
        self.x = [worksets.activation(layer, device) for layer in layers]
        rows = [layer.batch * layer.output_size**2 for layer in layers]
        self.flops = float(sum(4 * STEPS * r * layer.patch for r, layer in zip(rows, layers)))
        self.bytes = float(sum(STEPS * x.nbytes for x in self.x))
        self.floor = free_floor(layers, STEPS)

    def variants(self) -> dict[str, Variant]:
        """Native, and a convolution with its weight's gradient."""
        return {
            "native": lambda: [self._native(x, layer) for x, layer in zip(self.x, self.layers)],
            "conv2d": lambda: [baselines.matrix_free_steps(x, layer, STEPS) for x, layer in zip(self.x, self.layers)],
        }

    def _native(self, x: Tensor, layer: LayerShape) -> Tensor:
        kernel, place = (layer.kernel, {"stride": layer.stride, "padding": layer.padding}) if layer.size else (None, {})
        start = x.new_ones(layer.patch)
        return kfac_ext.covariance_power_iteration(x, kernel, start, tol=0.0, max_iter=STEPS, **place).eigenvalues

    def error(self) -> float:
        """Worst relative error of native's eigenvalues against float64, on a few images of each layer."""
        few = [(x[:4], layer) for x, layer in zip(self.x, self.layers)]
        exact = [baselines.matrix_free_steps(x.double(), layer, STEPS)[None] for x, layer in few]
        return worst_error([self._native(x, layer) for x, layer in few], exact)


def score_operands(
    layers: Sequence[LayerShape], device: torch.device
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """V, H = (A + lambda I)^-1 and G of each layer, of random inputs and gradients."""
    matrices = factors(layers, device)
    weights = [worksets.weight(layer, device) for layer in layers]
    return weights, kfac_ext.damped_inverse(matrices[::2], DAMPING), matrices[1::2]


class Saliencies:
    """Scores 1/2 tr(V_J^T G V_J (H_JJ)^-1) of all neurons of all layers."""

    def __init__(self, layers: Sequence[LayerShape], device: torch.device) -> None:
        self.weights, self.inverses, self.Gs = score_operands(layers, device)
        self.blocks = [layer.kernel**2 for layer in layers]
        # G V, then V_J^T (G V)_J
        self.flops = float(sum(2 * i.outputs * i.patch * (i.outputs + i.kernel**2) for i in layers))
        self.bytes = float(sum(4 * i.outputs * (i.patch + i.outputs) for i in layers))
        self.floor = saliency_floor(layers)

    def variants(self) -> dict[str, Variant]:
        """Native, and all neurons of a layer as one batch."""
        arguments = (self.weights, self.inverses, self.Gs, self.blocks)
        return {
            "native": lambda: kfac_ext.obs_saliency(*arguments),
            "batched": lambda: reference.obs_saliency(*arguments),
        }

    def error(self) -> float:
        """Worst relative error of native against float64."""
        layers = [i for i, H in enumerate(self.inverses) if len(H) <= LARGEST_CHECKED]
        few = [[values[i] for i in layers] for values in (self.weights, self.inverses, self.Gs)]
        blocks = [self.blocks[i] for i in layers]
        exact = reference.obs_saliency(*([m.double() for m in values] for values in few), blocks)
        return worst_error(kfac_ext.obs_saliency(*few, blocks), exact)
