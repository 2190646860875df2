"""The tables of docs/kernels.md from the document of a GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from bench.documents import table
from bench.goals import GPU_GOALS, goals_table
from bench.gpu.floor import share
from bench.gpu.names import FAMILIES, KINDS, NETWORKS, PRECISIONS, TRAINED
from bench.results import Case, by_key, commits
from bench.table import machine_line

Cases = Mapping[tuple[str, str], Case]


def results_table(document: Mapping[str, Any]) -> str:
    """Machine and commit in a line, then a Markdown table for each family, one of training steps, and the goals."""
    cases, commit = by_key(document), ", ".join(commits(document["cases"]))
    lines = [f"{machine_line(document)}; commit {commit or 'unknown'}."]
    if document["left_out"]:
        lines += ["", f"Left out: {', '.join(f'{name} ({why})' for name, why in document['left_out'].items())}."]
    failed = [f"{name} ({o['last']})" for name, o in document["steps"].items() if o["exit"]]
    if failed:
        lines += ["", f"Failed: {', '.join(failed)}."]
    for family in FAMILIES:
        lines += _family(family, cases, document.get("rates_before"))
    lines += _training(cases)
    if not document["quick"]:
        lines += ["", "Goals, set for an H100: how many times as long the other takes", ""]
        lines += goals_table(document, GPU_GOALS)
    return "\n".join(lines)


def _family(family: str, cases: Cases, reached: Mapping[str, float] | None) -> Iterator[str]:
    rows = []
    variants: list[str] = []
    for network in NETWORKS:
        found = [cases[key] for name in PRECISIONS if (key := (family, f"{network}, {name}")) in cases]
        if len(found) == len(PRECISIONS):
            variants = list(found[0]["variants"])
            rows.append([network, *_cells(found, variants, reached)])
    if not rows:
        return
    head = [f"{variant}, {name}" for name in PRECISIONS for variant in variants]
    head += ["graph", "error float32, tf32", "share of the floor", "times native in tf32", "longest kernel in tf32"]
    yield ""
    yield f"{family.capitalize()}, milliseconds (median); native as a replayed graph; error against float64"
    yield ""
    yield from table(("", *head), rows)


def _cells(found: list[Case], variants: list[str], reached: Mapping[str, float] | None) -> Iterator[str]:
    for case in found:
        yield from (_ms(case["variants"][variant]["median"]) for variant in variants)
    yield ", ".join(_ms(case["graph"]) if isinstance(case.get("graph"), float) else "-" for case in found)
    yield ", ".join(f"{case['native_error']:.1e}" for case in found)
    yield ", ".join(f"{share(case, reached):.2f}" for case in found) if reached else "-"
    last = found[-1]
    yield ", ".join(f"{last['variants'][variant]['speedup']:.1f}" for variant in variants if variant != "native")
    yield next((f"{_short(name)} {_ms(seconds)}" for name, seconds in last.get("kernels", {}).items()), "-")


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def _short(kernel: str) -> str:
    """The kernel's name without namespaces and arguments."""
    found = re.search(r"\w+_kernel", kernel)
    return f"`{found[0]}`" if found else kernel.split("(")[0]


def _training(cases: Cases) -> Iterator[str]:
    """Milliseconds a step; what was measured before a process failed stands too."""
    rows = []
    for name in TRAINED:
        found = [cases.get(("training step", f"{name}, {kind}")) for kind in KINDS]
        if any(found):
            rows.append([name, *(cell for case in found for cell in _step(case))])
    if rows:
        yield ""
        yield "Training step, batch 128, milliseconds (median): bare, and with the defaults of `flatprune run`"
        yield ""
        heads = [head for kind in KINDS for head in (f"{kind}: bare", "flatprune", "ratio")]
        yield from table(("", *heads), rows)


def _step(case: Case | None) -> list[str]:
    if case is None:
        return ["-"] * 3
    bare, full = (case["variants"][name]["median"] for name in ("bare", "flatprune"))
    return [_ms(bare), _ms(full), f"{full / bare:.2f}"]
