"""The table of docs/kernels.md from the JSON of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.gpu.measure import PRECISIONS
from bench.gpu.training import training_table

# at least so many times as fast as this variant, PyTorch in tf32, on an H100
GOALS = {
    "covariance": ("strided unfold", {"VGG19 b128": 3.7, "ResNet32 b128": 7, "ResNet50 b32": 2.4}),
    "inverses": ("cholesky", {"VGG19 b128": 12, "ResNet32 b128": 80, "ResNet50 b32": 20}),
    "power iteration": ("loop without test", {"VGG19 b128": 9, "ResNet32 b128": 200, "ResNet50 b32": 25}),
    "saliency": ("batched", {"VGG19 b128": 2, "ResNet32 b128": 30, "ResNet50 b32": 6}),
}


def results_table(document: dict[str, Any]) -> str:
    """The device in a line, then a Markdown table for each family."""
    m, c = document["machine"], document["ceilings"]
    lines = [
        f"{m.get('device', m['cpu'])}, driver {m.get('driver', '-')}, torch {m['build']['torch']}, "
        f"commit {m['commit']}; "
        f"copy {c['copy_gbs']:.0f} GB/s, matmul {c['matmul_float32_tflops']:.1f} (float32) and "
        f"{c['matmul_tf32_tflops']:.1f} (tf32) TFLOP/s.",
    ]
    if document["left_out"]:
        lines += ["", f"Left out for lack of time: {', '.join(document['left_out'])}."]
    for family, networks in document["results"].items():
        lines += _family(family, networks)
    if "training" in document:
        lines += ["", training_table(document)]
    return "\n".join(lines)


def _family(family: str, networks: dict[str, Any]) -> Iterator[str]:
    variants = list(next(iter(networks.values()))["float32"]["ms"])
    head = [f"{variant}, {name}" for name in PRECISIONS for variant in variants]
    head += ["error float32, tf32", "fraction of matmul, of copy", "ratio in tf32 (goal)"]
    yield ""
    yield f"{family.capitalize()}, milliseconds (median); error of native against float64; fractions, ratio of native"
    yield ""
    yield f"| | {' | '.join(head)} |"
    yield f"| --- |{' ---: |' * len(head)}"
    baseline, goals = GOALS.get(family, (variants[-1], {}))
    for network, entry in networks.items():
        cells = [f"{entry[name]['ms'][v]['median']:.3g}" for name in PRECISIONS for v in variants]
        cells.append(", ".join(f"{entry[name]['native_error']:.1e}" for name in PRECISIONS))
        cells.append(", ".join(f"{entry['fractions']['tf32'][name]:.2f}" for name in ("matmul", "copy")))
        goal = f" ({goals[network]:g})" if network in goals else ""
        cells.append(f"{entry['ratios'][f'{baseline} tf32 / native tf32']:.1f}{goal}")
        yield f"| {network} | {' | '.join(cells)} |"
