"""The tables of docs/kernels.md from the JSON of a GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from bench.gpu.floor import shares
from bench.gpu.names import FAMILIES, KINDS, NETWORKS, PRECISIONS, TRAINED

# at least so many times as fast as this variant, PyTorch in tf32, on an H100; by the counts of docs/kernels.md
GOALS: dict[str, tuple[str, dict[str, float]]] = {
    "covariance": ("strided unfold", {"VGG19 b128": 2.2, "ResNet32 b128": 5, "ResNet50 b32": 1.6}),
    "inverses": ("cholesky", {"VGG19 b128": 6, "ResNet32 b128": 60, "ResNet50 b32": 10}),
    "power iteration": ("loop without test", {"VGG19 b128": 3, "ResNet32 b128": 100, "ResNet50 b32": 10}),
    "saliency": ("batched", {"VGG19 b128": 2, "ResNet32 b128": 30, "ResNet50 b32": 6}),
}


def results_table(document: Mapping[str, Any]) -> str:
    """The device in a line, then a Markdown table for each family, and one of training steps."""
    results = {name: o["result"] for name, o in document["steps"].items() if "result" in o and not o["exit"]}
    lines = [_device(document["machine"], results.get("ceilings", {}))]
    if document["left_out"]:
        lines += ["", f"Left out: {', '.join(f'{name} ({why})' for name, why in document['left_out'].items())}."]
    failed = [f"{name} ({o['last']})" for name, o in document["steps"].items() if o["exit"]]
    if failed:
        lines += ["", f"Failed: {', '.join(failed)}."]
    for family in FAMILIES:
        networks = {n: results[f"{family}, {n}"] for n in NETWORKS if f"{family}, {n}" in results}
        if networks:
            lines += _family(family, networks, results.get("ceilings"))
    lines += _training(document["steps"])
    return "\n".join(lines)


def _device(machine: Mapping[str, Any], ceilings: Mapping[str, float]) -> str:
    words = [machine.get("device", machine["cpu"]), f"driver {machine.get('driver', '-')}", f"torch {machine['torch']}"]
    words.append(f"commit {machine['commit']}")
    if ceilings:
        words.append(f"copy {ceilings['copy_gbs']:.0f} GB/s")
        words += [f"matmul in {p} {ceilings[f'matmul_{p}_tflops']:.1f} TFLOP/s" for p in PRECISIONS]
    return ", ".join(words) + "."


def _family(
    family: str, networks: Mapping[str, Mapping[str, Any]], ceilings: Mapping[str, float] | None
) -> Iterator[str]:
    variants = list(next(iter(networks.values()))["float32"]["ms"])
    head = [f"{variant}, {name}" for name in PRECISIONS for variant in variants]
    head += ["graph", "error float32, tf32", "share of the floor", "ratio in tf32 (goal)", "longest kernel in tf32"]
    yield ""
    yield f"{family.capitalize()}, milliseconds (median); native as a replayed graph; error against float64"
    yield ""
    yield f"| | {' | '.join(head)} |"
    yield f"| --- |{' ---: |' * len(head)}"
    baseline, goals = GOALS.get(family, (variants[-1], {}))
    for network, entry in networks.items():
        cells = [f"{entry[name]['ms'][v]['median']:.3g}" for name in PRECISIONS for v in variants]
        cells.append(", ".join(_graph(entry[name].get("graph")) for name in PRECISIONS))
        cells.append(", ".join(f"{entry[name]['native_error']:.1e}" for name in PRECISIONS))
        reached = shares(entry, ceilings) if ceilings else {}
        cells.append(", ".join(f"{share:.2f}" for share in reached.values()) or "-")
        goal = f" ({goals[network]:g})" if network in goals else ""
        cells.append(f"{entry['ratios'][f'{baseline} tf32 / native tf32']:.1f}{goal}")
        kernels = entry["tf32"].get("kernels", {})
        cells.append(next((f"{_short(name)} {ms:.3g}" for name, ms in kernels.items()), "-"))
        yield f"| {network} | {' | '.join(cells)} |"


def _short(kernel: str) -> str:
    """The kernel's name without namespaces and arguments."""
    found = re.search(r"\w+_kernel", kernel)
    return f"`{found[0]}`" if found else kernel.split("(")[0]


def _graph(value: float | str | None) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "-"


def _training(steps: Mapping[str, Any]) -> Iterator[str]:
    """Milliseconds a step; what was measured before a process failed stands too."""
    found = {name: steps.get(f"training, {name}", {}).get("result", {}).get("kinds", {}) for name in TRAINED}
    if not any(found.values()):
        return
    yield ""
    yield "Training step, batch 128, milliseconds (median): bare, and with the defaults of `flatprune run`"
    yield ""
    yield f"| | {' | '.join(f'{kind}: bare | flatprune | ratio' for kind in KINDS)} |"
    yield f"| --- |{' ---: |' * 3 * len(KINDS)}"
    for name, kinds in found.items():
        cells: list[str] = []
        for kind in KINDS:
            entry = kinds.get(kind, {})
            times = [f"{entry['ms'][v]['median']:.3g}" for v in ("bare", "flatprune")] if "ms" in entry else []
            cells += [*times, f"{entry['ratio']:.2f}"] if times else ["-"] * 3
        yield f"| {name} | {' | '.join(cells)} |"
