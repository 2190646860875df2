"""What the schedules of the CUDA kernels count for the networks of `bench.gpu`: the numbers of rooflines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.documents import table
from bench.gpu.floor import Floor
from bench.gpu.networks import work_sets
from bench.worksets import LayerShape, transformer
from kfac_ext import _C

H100 = (132, 227 << 10)  # multiprocessors, and the shared memory a block may have


def covariance_floor(layers: Sequence[LayerShape]) -> Floor:
    """One update of A and G: inputs are read, rows and slots written and read, outputs read and written."""
    counts = _covariance(layers)[0]
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
    floats = ("inputs", "packed", "tile reads", "tile reads in tf32", "slots", "outputs")
    rows = []
    for network, layers in (work_sets(False) | {"BERT-base 32 x 128": transformer(32 * 128, 768, 12)}).items():
        found, workspace = _covariance(layers)
        counts = {key: value / 1e6 for key, value in found.items()}
        counts["tile_reads_in_tf32"] = _covariance(layers, tf32=True)[0]["tile_reads"] / 1e6
        plain = sum(layer.batch * layer.output_size**2 * (layer.patch**2 + layer.outputs**2) for layer in layers)
        counted = [f"{counts[name.replace(' ', '_')]:.1f}" for name in floats]
        products = [f"{counts['products'] / 1e3:.1f}", f"{plain / 1e9:.1f}"]
        rows.append((network, *products, *counted, f"{workspace / 1e6:.0f}"))
    return "\n".join(table(("", "products, 10^9", "plain, 10^9", *floats, "workspace, MB"), rows))


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


def _covariance(layers: Sequence[LayerShape], tf32: bool = False) -> tuple[dict[str, float], int]:
    """What the schedules of all layers count, and the bytes of the largest workspace."""
    half = _C.max_group_layers // 2  # each has A and G
    cut = [layers[first : first + half] for first in range(0, len(layers), half)]
    groups = [_C.CovarianceGroup([problem for layer in part for problem in _problems(layer, tf32)]) for part in cut]
    counts = [group.counts() for group in groups]
    return {key: sum(c[key] for c in counts) for key in counts[0]}, max(group.workspace_bytes for group in groups)


def _problems(layer: LayerShape, tf32: bool) -> list[tuple[Any, ...]]:
    """A and G of a layer with contiguous float32 inputs, as `_C.CovarianceGroup` takes them."""
    n, c, size, out = layer.batch, layer.channels, max(layer.size, 1), layer.output_size
    k, pad = (layer.kernel, layer.padding) if layer.is_convolution else (1, 0)
    a = (n, c, size, size, k, k, layer.stride, layer.stride, pad, pad, 1, 1, out, out, layer.groups)
    g = (n, layer.outputs, out, out, 1, 1, 1, 1, 0, 0, 1, 1, out, out, 1)
    strides = [(channels * s * s, s * s, s, 1) for channels, s in ((c, size), (layer.outputs, out))]
    return [(0, strides[i], shape, False, 0, False, int(tf32)) for i, shape in enumerate((a, g))]
