"""What the schedules of the CUDA kernels count for the networks of `bench.gpu`: the numbers of rooflines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.documents import table
from bench.gpu.floor import Floor
from bench.gpu.networks import work_sets
from bench.worksets import LayerShape
from kfac_ext import _C

H100 = (132, 227 << 10)  # multiprocessors, and the shared memory a block may have


def covariance_floor(layers: Sequence[LayerShape]) -> Floor:
    """One update of A and G: inputs are read, rows and slots written and read, outputs read and written."""
    counts = _C.CovarianceGroup([problem for layer in layers for problem in _problems(layer)]).counts()
    floats = counts["inputs"] + 2 * (counts["packed"] + counts["slots"] + counts["outputs"])
    return Floor(counts["products"], 3 * counts["products"], 0.0, 4 * floats)


def inverse_floor(layers: Sequence[LayerShape]) -> Floor:
    """All inverses, in full precision whatever is allowed."""
    sizes = _sizes(layers)
    products = 3 * _C.InverseGroup([(n, n) for n in sizes]).counts()["products"]
    return Floor(products, products, 0.0, 8.0 * sum(n * n for n in sizes))


def power_floor(layers: Sequence[LayerShape], steps: int) -> Floor:
    """All factors, of which those in shared memory are read once."""
    counts = _power(_sizes(layers))
    read = counts["kept"] + steps * (counts["entries"] - counts["kept"])
    return Floor(0.0, 0.0, steps * counts["entries"], 4 * read)


def free_floor(layers: Sequence[LayerShape], steps: int) -> Floor:
    """Two products with every patch a step, which reads the inputs once."""
    products = sum(2 * layer.batch * layer.output_size**2 * layer.patch for layer in layers)
    return Floor(0.0, 0.0, float(steps * products), float(steps * sum(layer.input_bytes for layer in layers)))


def saliency_floor(layers: Sequence[LayerShape]) -> Floor:
    """Scores of all neurons: V and G are read, and of H the blocks."""
    products = _C.SaliencyGroup(_saliency_shapes(layers)).counts()["products"]
    floats = sum(i.outputs * (i.patch + i.outputs) + i.patch * i.kernel**2 for i in layers)
    return Floor(0.0, 0.0, products, 4.0 * floats)


def greedy_floor(layers: Sequence[LayerShape], removals: int) -> Floor:
    """Copies of V and H, first scores, then a pass over the rows of L and over V for each neuron that goes."""
    products = floats = 0.0
    for i in layers:
        rows = sum(step * i.kernel**2 + i.outputs for step in range(removals))
        products += i.outputs**2 * i.patch + 2.0 * i.patch * rows * i.kernel**2
        floats += 2.0 * i.patch * (i.patch + i.outputs) + i.patch * rows
    return Floor(0.0, 0.0, products, 4 * floats)


def covariance_table() -> str:
    """One update of A and G of all layers."""
    head = ("products, 10^9", "plain, 10^9", "inputs", "packed", "tile reads", "slots", "outputs", "workspace, MB")
    rows = []
    for name, layers in work_sets(False).items():
        group = _C.CovarianceGroup([problem for layer in layers for problem in _problems(layer)])
        counts = {key: value / 1e6 for key, value in group.counts().items()}
        plain = sum(layer.batch * layer.output_size**2 * (layer.patch**2 + layer.outputs**2) for layer in layers)
        floats = [f"{counts[key]:.1f}" for key in ("inputs", "packed", "tile_reads", "slots", "outputs")]
        products = [f"{counts['products'] / 1e3:.1f}", f"{plain / 1e9:.1f}"]
        rows.append((name, *products, *floats, f"{group.workspace_bytes / 1e6:.0f}"))
    return "\n".join(table(("", *head), rows))


def algebra_table() -> str:
    """One step of power iteration of all factors, their inverses, the scores of all neurons."""
    head = (
        "power iteration: entries, 10^6",
        "in shared memory",
        "of the busiest block",
        "matrix-free: products a step, 10^9",
        "input floats, 10^6",
        "inverses: products, 10^9",
        "plain, 10^9",
        "launches",
        "pivots in a row",
        "scores: products, 10^9",
        "plain, 10^9",
    )
    rows = []
    for name, layers in work_sets(False).items():
        sizes = _sizes(layers)
        power = {key: value / 1e6 for key, value in _power(sizes).items()}
        inverse = _C.InverseGroup([(n, n) for n in sizes]).counts()
        scores = _C.SaliencyGroup(_saliency_shapes(layers)).counts()
        free = sum(2 * layer.batch * layer.output_size**2 * layer.patch for layer in layers)
        rows.append(
            (
                name,
                f"{power['entries']:.2f}",
                f"{power['kept']:.2f}",
                f"{power['most']:.2f}",
                f"{free / 1e9:.2f}",
                f"{sum(layer.input_bytes for layer in layers) / 4e6:.1f}",
                f"{inverse['products'] / 1e9:.2f}",
                f"{sum(n**3 for n in sizes) / 2e9:.2f}",
                f"{inverse['launches']:.0f}",
                f"{inverse['pivots']:.0f}",
                f"{scores['products'] / 1e9:.2f}",
                f"{sum(i.outputs**2 * i.patch for i in layers) / 1e9:.2f}",
            )
        )
    return "\n".join(table(("", *head), rows))


def _sizes(layers: Sequence[LayerShape]) -> list[int]:
    return [n for layer in layers for n in (layer.patch, layer.outputs)]


def _saliency_shapes(layers: Sequence[LayerShape]) -> list[tuple[int, ...]]:
    return [(i.outputs, i.patch, i.kernel**2, i.patch, i.patch, i.outputs) for i in layers]


def _power(sizes: Sequence[int]) -> dict[str, float]:
    counts = _C.PowerGroup([(n, n) for n in sizes], *H100).counts()
    assert counts["entries"] == sum(n * n for n in sizes), "every row is one block's"
    return counts


def _problems(layer: LayerShape) -> list[tuple[Any, ...]]:
    """A and G of a layer with contiguous float32 inputs, as `_C.CovarianceGroup` takes them."""
    n, c, size, out = layer.batch, layer.channels, max(layer.size, 1), layer.output_size
    k, pad = (layer.kernel, layer.padding) if layer.is_convolution else (1, 0)
    a = (n, c, size, size, k, k, layer.stride, layer.stride, pad, pad, 1, 1, out, out, layer.groups)
    g = (n, layer.outputs, out, out, 1, 1, 1, 1, 0, 0, 1, 1, out, out, 1)
    strides = [(channels * s * s, s * s, s, 1) for channels, s in ((c, size), (layer.outputs, out))]
    return [(0, strides[0], a, False, 0, False, 0), (0, strides[1], g, False, 0, False, 0)]
