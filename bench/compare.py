"""Flag what became slower (or needs more memory) beyond the noise.

    python bench/compare.py old.json new.json [--margin 0.05]

Exit status 1 if anything regressed, 2 if the files cannot be compared. Where a case has plain PyTorch beside native,
their ratio is compared, since both ran alternately in one process and share the machine's load; elsewhere the time
itself. A regression is a change of the median for the worse by more than the margin (25 % for memory, which is measured
in pages and buffers) and by more than both runs' spreads together, with quartiles that do not overlap.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.results import by_key, load
from bench.table import is_noisy, noise_line

MEMORY_MARGIN = 0.25
MEMORY_GRAIN = 2**20  # bytes: below this a change is not worth a word
REGRESSION, IMPROVEMENT, SAME = "REGRESSION", "improvement", "same"


class Figure(NamedTuple):
    """A cost with its quartiles: lower is better."""

    median: float
    q1: float
    q3: float
    what: str

    @property
    def spread(self) -> float:
        """Distance of the quartiles as a part of the median."""
        return (self.q3 - self.q1) / self.median if self.median else 0.0


class Change(NamedTuple):
    """One case in both files."""

    case: str
    old: Figure
    new: Figure
    verdict: str

    @property
    def factor(self) -> float:
        """New over old cost."""
        return self.new.median / self.old.median if self.old.median else 1.0


def figure(case: Mapping[str, Any], relative: bool) -> Figure | None:
    """The cost of native in a case; None where there is nothing to compare."""
    native = case["variants"].get("native")
    if native is None:
        return None
    if case["kind"] == "memory":
        return Figure(native["median"], native["min"], native["max"], "bytes")
    if case["kind"] != "time":
        return None
    baseline = baseline_of(case)
    if relative and baseline and "paired_speedup" in case["variants"][baseline]:
        plain = case["variants"][baseline]  # paired_* is plain over native
        return Figure(
            1 / plain["paired_speedup"], 1 / plain["paired_q3"], 1 / plain["paired_q1"], f"fraction of {baseline}"
        )
    return Figure(native["median"], native["q1"], native["q3"], "seconds")


def baseline_of(case: Mapping[str, Any]) -> str | None:
    """The first variant that is not ours."""
    return next((name for name in case["variants"] if not name.startswith("native")), None)


def verdict(old: Figure, new: Figure, margin: float) -> str:
    """Whether `new` differs from `old` beyond margin and noise."""
    if old.what == "bytes" and abs(new.median - old.median) <= MEMORY_GRAIN:
        return SAME
    bound = 1 + max(margin, old.spread + new.spread)
    if new.median > old.median * bound and new.q1 > old.q3:
        return REGRESSION
    if new.median < old.median / bound and new.q3 < old.q1:
        return IMPROVEMENT
    return SAME


def compare(old: Mapping[str, Any], new: Mapping[str, Any], margin: float = 0.05) -> Iterator[Change]:
    """A change for every case that both documents have."""
    before = by_key(old)
    for key, case in by_key(new).items():
        if key not in before or before[key]["kind"] != case["kind"]:
            continue
        relative = baseline_of(before[key]) == baseline_of(case)
        first, second = figure(before[key], relative), figure(case, relative)
        if first is not None and second is not None:
            bound = MEMORY_MARGIN if first.what == "bytes" else margin
            yield Change(" / ".join(key), first, second, verdict(first, second, bound))


def differing_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What besides the code differs between the runs."""
    names = ("cpu", "cores", "threads", "simd", "torch")
    found = [f"{n}: {old['machine'][n]} / {new['machine'][n]}" for n in names if old["machine"][n] != new["machine"][n]]
    return found + ([f"quick: {old['quick']} / {new['quick']}"] if old["quick"] != new["quick"] else [])


def main(arguments: list[str] | None = None) -> int:
    """Print the changes; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--margin", type=float, default=0.05, help="smallest change of time that counts (default 0.05)")
    options = parser.parse_args(arguments)
    try:
        old, new = load(options.old), load(options.new)
    except (OSError, ValueError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    for line in differing_settings(old, new):
        print(f"differs: {line}")
    for name, document in ((options.old, old), (options.new, new)):
        if is_noisy(document):
            print(f"{name}: {noise_line(document)}")
    changes = list(compare(old, new, options.margin))
    if not changes:
        print("compare: the files have no case in common", file=sys.stderr)
        return 2
    for change in sorted(changes, key=lambda c: -c.factor):
        if change.verdict != SAME:
            print(
                f"{change.verdict:11} x{change.factor:.2f}  {change.case}: "
                f"{change.old.median:.3g} -> {change.new.median:.3g} ({change.new.what})"
            )
    regressions = sum(change.verdict == REGRESSION for change in changes)
    missing = [" / ".join(key) for key in by_key(old) if key not in by_key(new)]
    if missing:
        print(f"not measured any more: {len(missing)} ({', '.join(missing[:5])}{', ...' if missing[5:] else ''})")
    print(f"{len(changes)} cases compared, {regressions} regressed")
    return 1 if regressions else 0


if __name__ == "__main__":
    raise SystemExit(main())
