"""Options of the suite, the fixture that measures a case, and the table at the end of a run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.results import Results, default_path
from bench.table import print_summary
from bench.timing import Alternation, Variant, slope, spread, timed_case

_BUDGET, _QUICK_BUDGET = 4.0, 0.6  # seconds of sampling for a case
_ROUNDS, _QUICK_ROUNDS = 7, 3  # at least
_RESULTS = pytest.StashKey[Results]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """--quick, --bench-threads, --bench-out, --bench-fresh."""
    group = parser.getgroup("kfac-ext benchmarks")
    group.addoption("--quick", action="store_true", help="few cases and few rounds: under 3 minutes on 2 cores")
    group.addoption("--bench-threads", type=int, help="threads of torch and of the native kernels (default: torch's)")
    group.addoption("--bench-out", type=Path, help="result file (default: bench/results/<cpu>-<threads>t.json)")
    group.addoption("--bench-fresh", action="store_true", help="forget the cases of an earlier run in that file")


def pytest_configure(config: pytest.Config) -> None:
    """Threads first: everything later asks torch for them. pytest-benchmark's own table is of whole rounds: hidden."""
    config.option.benchmark_quiet = True
    threads = config.getoption("--bench-threads")
    if threads:
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether this is a quick run."""
    return request.config.getoption("--quick")


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest, quick: bool) -> Results:
    """The document that cases are added to."""
    config = request.config
    found = Results(
        config.getoption("--bench-out") or default_path(quick), quick=quick, fresh=config.getoption("--bench-fresh")
    )
    config.stash[_RESULTS] = found
    return found


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Whether the run came to its end is part of the results."""
    if _RESULTS in session.config.stash and exitstatus == pytest.ExitCode.OK:
        session.config.stash[_RESULTS].finish()


class Measure:
    """Measures the variants of a case alternately and adds it to the results; `native` is what the others are held to.

    pytest-benchmark drives the rounds: one of its rounds runs every variant once. Its own statistics are those of
    whole rounds; the figures of the variants are in `extra_info` and in the result file.
    """

    def __init__(self, benchmark: Any, results: Results, quick: bool) -> None:
        self.benchmark, self.results, self.quick = benchmark, results, quick

    def __call__(
        self,
        suite: str,
        name: str,
        variants: Mapping[str, Variant],
        *,
        skipped: Mapping[str, str] | None = None,
        per: float = 1.0,
        before: Mapping[str, Callable[[], Any]] | None = None,
        max_rounds: int | None = None,
        **facts: Any,
    ) -> dict[str, Any]:
        """Measure; times are divided by `per` (steps in one call, say). Facts go into the entry as they are."""
        alternation = Alternation(variants, before=before)
        budget, least = (_QUICK_BUDGET, _QUICK_ROUNDS) if self.quick else (_BUDGET, _ROUNDS)
        rounds = alternation.calibrate(budget, least)
        rounds = min(rounds, max_rounds) if max_rounds else rounds
        self.benchmark.pedantic(alternation.round, rounds=rounds, iterations=1)
        facts = {**facts, "skipped": dict(skipped or {})}
        case = timed_case(suite, name, alternation.samples, per=per, **facts)
        self.benchmark.extra_info.update(case)
        self.results.add(case)
        _say(case)
        return case

    def growth(
        self,
        name: str,
        along: str,
        points: Mapping[int, Mapping[str, Variant]],
        *,
        before: Mapping[int, Mapping[str, Callable[[], Any]]] | None = None,
        **facts: Any,
    ) -> dict[str, Any]:
        """Measure the same variants at several sizes; slopes of a straight line in log-log."""
        befores = before or {}
        runs = {x: Alternation(variants, before=befores.get(x)) for x, variants in points.items()}
        budget, least = (_QUICK_BUDGET, _QUICK_ROUNDS) if self.quick else (_BUDGET, _ROUNDS)
        rounds = min(alternation.calibrate(budget / len(runs), least) for alternation in runs.values())

        def one_round() -> None:
            for alternation in runs.values():
                alternation.round()

        self.benchmark.pedantic(one_round, rounds=rounds, iterations=1)
        medians = {
            variant: [statistics.median(a.samples[variant].wall) for a in runs.values()]
            for variant in next(iter(points.values()))
        }
        xs = list(points)
        case = {
            "suite": "growth",
            "name": name,
            "kind": "growth",
            "unit": "s",
            "along": along,
            "rounds": rounds,
            "x": xs,
            **facts,
            "variants": {v: {"medians": times, "slope": slope(xs, times)} for v, times in medians.items()},
        }
        self.benchmark.extra_info.update(case)
        self.results.add(case)
        found = ", ".join(f"{v} {entry['slope']:.2f}" for v, entry in case["variants"].items())
        print(f"\n  growth / {name}: slope with {along}: {found}", end="")
        return case


@pytest.fixture
def measure(benchmark: Any, results: Results, quick: bool) -> Measure:
    """See `Measure`."""
    return Measure(benchmark, results, quick)


@pytest.fixture
def record(results: Results) -> Callable[..., dict[str, Any]]:
    """Add a case that was measured otherwise (memory, import time)."""

    def add(suite: str, name: str, kind: str, unit: str, variants: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
        case = {"suite": suite, "name": name, "kind": kind, "unit": unit, **facts, "variants": dict(variants)}
        results.add(case)
        return case

    return add


def _say(case: Mapping[str, Any]) -> None:
    """One line a case as it comes: a full run takes a while."""
    times = ", ".join(f"{name} {1e3 * v['median']:.3g} ms (±{spread(v):.0%})" for name, v in case["variants"].items())
    print(f"\n  {case['suite']} / {case['name']}: {times}", end="")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table of all cases of this run."""
    if _RESULTS in config.stash:
        print_summary(config.stash[_RESULTS].document)
        terminalreporter.write_line(f"results: {config.stash[_RESULTS].path}")
