"""Write docs/benchmarks.md and docs/benchmarks.png from a CPU's results, and a GPU's into docs/kernels.md.

python -m bench.report [results.json] [--out docs]      # one of either; default: the newest of both
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.documents import replace_between, table
from bench.goals import goals_table
from bench.gpu.table import results_table
from bench.machine import ROOT
from bench.results import RESULTS, commits, load, of_suite
from bench.table import machine_line, noise_line, noisy_cases, quantity, reasons, seconds
from bench.timing import spread

_OURS, _PLAIN, _PEER = "#2a6f97", "#b8b8b8", "#e09f3e"
_SUITES = {
    "covariance": "Covariance: A (inputs) and G (gradients) of every layer of a network",
    "covariance of one layer": "Covariance of one layer's input",
    "power iteration": "Power iteration: the dominant eigenpair of every factor of a network",
    "inverse": "Damped inverses of every factor of a network",
    "saliency": "Saliency and compensation of every layer of a network",
    "training step": "A whole training step",
    "pruner construction": "Making a pruner",
    "removal": "One removal event",
    "call overhead": "Call overhead on 4 x 4 matrices",
    "import": "Import time",
    "memory": "Peak extra memory",
    "growth": "Growth",
}
_COVARIANCES = "Each call renews a running average, A <- 0.95 A + 0.05 new, which is what training needs."
_NOTES = {
    "covariance": _COVARIANCES,
    "covariance of one layer": (
        f"{_COVARIANCES} `native, new tensor` returns the value in fresh memory instead, whose pages the system must "
        "clear first. The layers of the networks are all their distinct ones."
    ),
    "training step": (
        "`native` with factors every step: A and G of every layer, expand, from the gradients of the step's own "
        "backward (empirical Fisher), and the eigenpair of each; the quantity that the peers and `hooks + unfold` "
        "make. `native, true Fisher` adds a partial backward for sampled labels. asdl and singd use the step's own "
        "backward, backpack extends it, curvlinops and nngeometry make passes of their own. `K-FAC every k steps` "
        "renews factors (expand) and inverses that often and preconditions every step; `hooks + unfold` there is "
        "kfac-pytorch's recipe, layer by layer. `defaults` and "
        "`with pruning` are means over 40 steps of `Curvature`, `Flatness` and `Pruner` with their defaults."
    ),
    "memory": (
        "Growth of the resident set's high-water mark in a process of its own, results included, inputs not. The "
        "covariances update running averages; below them the largest input of a layer of that network. Below that of "
        "making a pruner the model's parameters and buffers."
    ),
    "growth": "Slope of a straight line in log-log: 1 is linear, 2 quadratic. Times are those at the largest size.",
    "pruner construction": "`native`: `Pruner(...)` of one example. `bare step`: one step of a whole batch.",
    "removal": "`plain operations`: the same with `kfac_ext.use_native(False)`. torch-pruning scores by magnitude.",
}


def markdown(document: Mapping[str, Any], source: str) -> str:
    """The whole page."""
    lines = [
        "# Benchmarks",
        "",
        f"Made by `make bench-report` from `{source}`; nothing here is written by hand.",
        "",
        f"- Machine: {machine_line(document)}.",
        f"- Run: {document['started']}, {'quick' if document['quick'] else 'full'}"
        + ("" if document["finished"] else ", interrupted: what was measured until then")
        + f"; commit {', '.join(commits(document['cases']))}.",
        f"- Peers: {_peers(document)}.",
        f"- {noise_line(document)}.",
        "- What a GPU takes stands on the page of the [CUDA kernels](kernels.md), made by the same command.",
        "- All variants of a case run alternately, in one process, on the same inputs, and their results are compared "
        "first. Times are medians; spread is the distance of the quartiles as a part of the median; *times native* is "
        "the ratio of the medians. CPU time is that of all threads, spinning ones included.",
        "",
        "![Speedups](benchmarks.png)",
        "",
        "## Goals",
        "",
        "Two cores, float32. A missed goal names every case that misses it, a reached one the tightest.",
        "",
        *goals_table(document),
    ]
    order = list(_SUITES)
    cases = sorted(document["cases"], key=lambda c: order.index(c["suite"]))
    for suite, group in groupby(cases, key=lambda c: c["suite"]):
        lines += ["", f"## {_SUITES[suite]}", "", *_suite(suite, list(group))]
    noisy = noisy_cases(document)
    if noisy:
        lines += ["", "## Wide spread", "", *(f"- {name}" for name in noisy)]
    return "\n".join(lines) + "\n"


def _peers(document: Mapping[str, Any]) -> str:
    peers = document["machine"]["peers"]
    return ", ".join(f"{name} {version or 'not installed'}" for name, version in peers.items())


def _suite(suite: str, cases: list[Mapping[str, Any]]) -> Iterator[str]:
    if suite in _NOTES:
        yield from (_NOTES[suite], "")
    if suite == "growth":
        yield from table(("case", "along", "slopes", "at the largest"), map(_growth, cases), "l")
    else:
        head = "case", "variant", "median", "spread", "CPU time", "times native"
        yield from table(head, (row for case in cases for row in _rows(case)), "llr")


def _growth(case: Mapping[str, Any]) -> tuple[str, ...]:
    slopes = ", ".join(f"{n} {v['slope']:.2f}" for n, v in case["variants"].items())
    times = ", ".join(f"{n} {seconds(v['medians'][-1])}" for n, v in case["variants"].items())
    return case["name"], f"{case['along']} {case['x'][0]} to {case['x'][-1]}", slopes, times


def _rows(case: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    label = case["name"] + (f" ({case['shape']})" if "shape" in case else "")
    timed = case["kind"] == "time"
    native = case["variants"].get("native")
    for i, (name, entry) in enumerate(case["variants"].items()):
        wide = f"{spread(entry):.0%}" if timed else ""
        cpu = seconds(entry["cpu_median"]) if "cpu_median" in entry else ""
        ratio = entry["median"] / native["median"] if native and native["median"] and name != "native" else None
        yield (
            label if not i else "",
            name,
            quantity(case, entry["median"]),
            wide,
            cpu,
            f"{ratio:.2f}" if ratio else "",
        )
    for fact in ("largest_activation", "model", "working_set"):
        if fact in case:
            yield "", f"*{fact.replace('_', ' ')}*", quantity(case, case[fact]), "", "", ""
    for peer, reason in reasons(case).items():
        yield "", peer, f"*{reason.replace('|', '/')}*", "", "", ""


def bars(document: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """(label, speedup, colour) of the operations on whole networks, against the plain way that is usual."""
    found = []
    for suite, variants in (
        ("covariance", ("unfold", "matmul")),
        ("power iteration", ("loop",)),
        ("inverse", ("linalg.inv",)),
        ("saliency", ("batched", "per layer")),
    ):
        for case in (c for c in document["cases"] if c["suite"] == suite):
            for variant in variants:
                if variant in case["variants"]:
                    label = f"{suite}: {case['name']}" if suite in ("inverse", "power iteration") else case["name"]
                    found.append((f"{label}  (vs {variant})", case["variants"][variant]["speedup"], _OURS))
    return found


def step_bars(document: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """(label, cost in bare steps, colour) of the variants of a training step on VGG-small."""
    found = []
    for case in document["cases"]:
        if case["suite"] != "training step" or not case["name"].endswith("VGG-small b64"):
            continue
        bare, kind = case["variants"]["bare"]["median"], case["name"].split(",")[0]
        for name, entry in case["variants"].items():
            if name != "bare":
                ours = name.startswith("native")
                colour = _OURS if ours else _PLAIN if name.startswith("hooks") else _PEER
                label = f"{kind}: {name}" if kind != "factors every step" or ours else name
                found.append((label, entry["median"] / bare, colour))
    return found


def plot(document: Mapping[str, Any], path: Path) -> None:
    """Two panels of bars: speedups of the operations, cost of a training step."""
    panels = [
        (bars(document), "times faster than plain PyTorch", 1.0),
        (step_bars(document), "training step of VGG-small, batch 64, in bare steps", 1.0),
    ]
    panels = [panel for panel in panels if panel[0]]
    if not panels:
        return
    heights = [len(values) for values, _, _ in panels]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, 1.6 + 0.27 * sum(heights)), height_ratios=heights, squeeze=False
    )
    for axis, (values, title, line) in zip(axes[:, 0], panels):
        labels, lengths, colours = zip(*values)
        drawn = axis.barh(range(len(values)), lengths, color=colours)
        axis.bar_label(drawn, fmt="%.2f", padding=3, fontsize=8)
        axis.set_yticks(range(len(values)), labels, fontsize=8)
        axis.axvline(line, color="black", linewidth=0.8)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.1)
    m = document["machine"]
    figure.supxlabel(f"{m['cpu']}, {m['threads']} threads, torch {m['torch']}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def newest(folder: Path = RESULTS, *, gpu: bool = False) -> Path | None:
    """The result file that was begun last: of whole runs, or of quick or interrupted ones without any."""
    documents = {path: found for path, found in of_suite(folder).items() if found["cases"] and is_of_gpu(found) == gpu}
    return max(documents, key=lambda path: _rank(documents[path]), default=None)


def is_of_gpu(document: Mapping[str, Any]) -> bool:
    """Whether it was measured on a GPU."""
    return "device" in document["machine"]


def _rank(document: Mapping[str, Any]) -> tuple[bool, bool, str]:
    return not document["quick"], document["finished"] is not None, document["started"]


def write(source: Path, out: Path) -> None:
    """The page and the chart of a CPU's results; of a GPU's the tables that stand in docs/kernels.md."""
    document = load(source)
    shown = source.relative_to(ROOT).as_posix() if source.is_relative_to(ROOT) else source.name
    out.mkdir(parents=True, exist_ok=True)
    if is_of_gpu(document):
        page = out / "kernels.md"
        made = f"Made by `make bench-report` from `{shown}`."
        replace_between(page, "gpu-results", f"{made}\n\n{results_table(document)}")
    else:
        page = out / "benchmarks.md"
        page.write_text(markdown(document, shown))
        plot(document, out / "benchmarks.png")
    print(f"wrote {page} from {shown}")


def main() -> None:
    """Write what there are results for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, help="default: of the newest whole runs in bench/results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder")
    options = parser.parse_args()
    sources = [options.results] if options.results else [newest(), newest(gpu=True)]
    found = [path for path in sources if path is not None]
    if not found:
        raise SystemExit(f"no results in {RESULTS}: run `make bench` first")
    for path in found:
        write(path.resolve(), options.out)


if __name__ == "__main__":
    main()
