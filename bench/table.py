"""The results in words, and as tables in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from bench.goals import verdicts
from bench.timing import WIDE_SPREAD, spread

_WIDTH = 128


def seconds(value: float) -> str:
    """With a unit that suits."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def quantity(case: Mapping[str, Any], value: float) -> str:
    """A value of a case with its unit."""
    return seconds(value) if case["unit"] == "s" else f"{value / 2**20:.1f} MiB"


def noisy_cases(document: Mapping[str, Any]) -> list[str]:
    """Cases in which some variant's quartiles are further apart than 15 % of its median."""
    return [
        f"{case['suite']} / {case['name']}"
        for case in document["cases"]
        if case["kind"] == "time" and any(spread(v) > WIDE_SPREAD for v in case["variants"].values())
    ]


def is_noisy(document: Mapping[str, Any]) -> bool:
    """Whether more than a quarter of the cases have a wide spread."""
    timed = [case for case in document["cases"] if case["kind"] == "time"]
    return len(noisy_cases(document)) > len(timed) / 4


def noise_line(document: Mapping[str, Any]) -> str:
    """How far the figures can be relied on, in one sentence."""
    timed = [case for case in document["cases"] if case["kind"] == "time"]
    noisy = noisy_cases(document)
    loads = [case["load"] for case in document["cases"] if case["load"] is not None]
    load = (
        f"; load average {min(loads):.1f} to {max(loads):.1f} on {document['machine']['cores']} cores" if loads else ""
    )
    verdict = "Spread"
    if is_noisy(document):
        verdict = "The spread is WIDE, other processes were busy, do not rely on single figures"
    apart = f"quartiles more than {WIDE_SPREAD:.0%} of the median apart in {len(noisy)} of {len(timed)} cases"
    return f"{verdict}: {apart}{load}"


def machine_line(document: Mapping[str, Any]) -> str:
    """Device, machine, threads, versions, and what was reached."""
    m, rates = document["machine"], document.get("rates_after") or document.get("rates_before")
    words = [f"{m['device']}, driver {m['driver']}"] if "device" in m else []
    words += [f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, {m['simd']}", m["system"]]
    words.append(f"Python {m['python']}, torch {m['torch']}, kfac-ext {m['kfac_ext']}")
    if rates:
        tf32 = f"tf32 matmul {rates['matmul_tf32_gflops']:g} GFLOP/s, " if "matmul_tf32_gflops" in rates else ""
        words.append(f"float32 matmul {rates['matmul_gflops']:g} GFLOP/s, {tf32}copy {rates['copy_gbs']:g} GB/s")
    return "; ".join(words)


def variant_rows(case: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str, str]]:
    """Variant, median, spread, CPU time, speedup of native over it."""
    for name, entry in case["variants"].items():
        if case["kind"] == "growth":
            yield name, seconds(entry["medians"][-1]), "", "", f"slope {entry['slope']:.2f}"
            continue
        spread_text = f"{spread(entry):.0%}" if case["kind"] == "time" else ""
        cpu = seconds(entry["cpu_median"]) if "cpu_median" in entry else ""
        ratio = f"{entry['speedup']:.2f}" if "speedup" in entry and name != "native" else ""
        yield name, quantity(case, entry["median"]), spread_text, cpu, ratio


def absent(document: Mapping[str, Any]) -> list[str]:
    """Peers that are not installed."""
    return [name for name, version in document["machine"]["peers"].items() if version is None]


def reasons(case: Mapping[str, Any]) -> dict[str, str]:
    """Why installed peers are missing from a case."""
    return {peer: reason for peer, reason in case["skipped"].items() if reason != "not installed"}


def print_summary(document: Mapping[str, Any]) -> None:
    """All suites, the goals, the noise."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=_WIDTH)
    console.print(f"\n{machine_line(document)}", highlight=False)
    for suite, cases in groupby(sorted(document["cases"], key=lambda c: c["suite"]), key=lambda c: c["suite"]):
        table = Table(title=suite, title_justify="left", expand=False)
        for column in ("case", "variant", "median", "spread", "CPU time", "times native"):
            table.add_column(column, justify="left" if column in ("case", "variant") else "right")
        for case in cases:
            for i, row in enumerate(variant_rows(case)):
                table.add_row(case["name"] if i == 0 else "", *row)
            for peer, reason in reasons(case).items():
                table.add_row("", peer, f"[dim]{reason[:60]}[/dim]")
        console.print(table)
    goals = Table(title="goals", title_justify="left")
    for column in ("goal", "wanted", "measured", ""):
        goals.add_column(column)
    for verdict in verdicts(document):
        goals.add_row(verdict.goal, verdict.wanted, verdict.measured, verdict.state)
    console.print(goals)
    if absent(document):
        console.print(f"Skipped, not installed: {', '.join(absent(document))}")
    console.print(noise_line(document), highlight=False)
