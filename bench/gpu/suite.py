"""Every family of operations on every network: times in both precisions, errors, ratios, fractions of the ceilings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from bench.gpu import linear_algebra as algebra
from bench.gpu.covariance import Covariances
from bench.gpu.measure import PRECISIONS, alternate, ceilings, precision
from bench.gpu.networks import work_sets
from bench.gpu.run import Run
from bench.worksets import LayerShape

ROUNDS = 15


class Work(Protocol):
    """One family's work for all layers of a network."""

    flops: float
    """operations of the plain way"""
    bytes: float
    """read and written at least"""

    def __init__(self, layers: Sequence[LayerShape], device: torch.device) -> None: ...

    def variants(self) -> dict[str, Callable[[], object]]:
        """Native and the baselines on the same inputs."""

    def error(self) -> float:
        """Worst relative error of native against float64."""


def families() -> dict[str, type[Work]]:
    """Name -> what is measured of a network."""
    return {
        "covariance": Covariances,
        "inverses": algebra.Inverses,
        "power iteration": algebra.PowerIterations,
        "matrix-free power iteration": algebra.MatrixFree,
        "saliency": algebra.Saliencies,
    }


def measured(work: Work, device: torch.device, rounds: int, seconds: float) -> dict[str, Any]:
    """In both precisions: milliseconds of each variant, error of the native one."""
    entry: dict[str, Any] = {"flops": work.flops, "bytes": work.bytes}
    for name in PRECISIONS:
        with precision(name):
            times = alternate(work.variants(), device, rounds, seconds / 2)
            entry[name] = {"ms": times, "native_error": work.error()}
    return entry


def ratios(entry: dict[str, Any]) -> dict[str, float]:
    """Each baseline over native at the same precision."""
    found = {}
    for name in ("float32", "tf32"):
        times = entry[name]["ms"]
        for baseline in times.keys() - {"native"}:
            found[f"{baseline} {name} / native {name}"] = times[baseline]["median"] / times["native"]["median"]
    return dict(sorted(found.items()))


def fractions(entry: dict[str, Any], reached: dict[str, float]) -> dict[str, dict[str, float]]:
    """Operations and bytes of the plain way in native's time, over what a matmul and a copy reach on this device.

    Above 1 where native needs fewer operations, or reads from a cache.
    """
    found = {}
    for name in ("float32", "tf32"):
        ms = entry[name]["ms"]["native"]["median"]
        found[name] = {
            "matmul": 1e-9 * entry["flops"] / ms / reached[f"matmul_{name}_tflops"],
            "copy": 1e-6 * entry["bytes"] / ms / reached["copy_gbs"],
        }
    return found


def bench(run: Run, device: torch.device, quick: bool) -> None:
    """Every family on every network, and the ceilings."""
    run.keep("ceilings", ceilings(device, quick))
    results: dict[str, Any] = {}
    work = {f"{family}, {name}": (family, name) for family in families() for name in work_sets(quick)}
    for label, (family, name), fraction in run.turns(work):
        work_set = work_sets(quick)[name]
        try:
            entry = measured(families()[family](work_set, device), device, 2 if quick else ROUNDS, fraction)
        except RuntimeError as error:
            run.failed(label, error)
            continue
        entry |= {"ratios": ratios(entry), "fractions": fractions(entry, run.document["ceilings"])}
        results.setdefault(family, {})[name] = entry
        run.keep("results", results)
