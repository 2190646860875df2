"""One family of operations on one network: times in both precisions, errors, kernels, a replayed graph, floors.

python -m bench.gpu.suite FAMILY NETWORK [--dry] --out FILE      # or `ceilings -`: what the device reaches
python -m bench.gpu.suite FAMILY NETWORK --once                  # native, once in each precision, for a profiler
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from bench.documents import write_json
from bench.gpu import linear_algebra as algebra
from bench.gpu.covariance import Covariances
from bench.gpu.floor import Floor
from bench.gpu.greedy import Selections
from bench.gpu.measure import alternate, ceilings, kernel_times, precision, replayed
from bench.gpu.names import PRECISIONS
from bench.gpu.networks import work_sets
from bench.results import Case
from bench.timing import timed_case
from bench.worksets import LayerShape

ROUNDS, SECONDS = 15, 3.0


class Work(Protocol):
    """One family's work for all layers of a network."""

    flops: float
    """operations of the plain way"""
    bytes: float
    """read and written at least"""
    floor: Floor
    """what the schedule of the native kernels counts"""

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
        "saliency": algebra.Saliencies,
        "greedy selection": Selections,
        "matrix-free power iteration": algebra.MatrixFree,
    }


def measured(family: str, network: str, device: torch.device, quick: bool) -> list[Case]:
    """A case for each precision, named "network, precision": times, error of native, its kernels, a replayed graph."""
    work = families()[family](work_sets(quick)[network], device)
    facts = {"network": network, "flops": work.flops, "bytes": work.bytes, "floor": work.floor._asdict()}
    cases = []
    for name in PRECISIONS:
        with precision(name):
            samples = alternate(work.variants(), device, 2 if quick else ROUNDS, SECONDS / 2)
            error = work.error()
        of_precision = {"precision": name, "native_error": error}
        cases.append(timed_case(family, f"{network}, {name}", samples, **facts, **of_precision))
    if device.type == "cuda":
        for kind, of_native in (("kernels", kernel_times), ("graph", replayed)):  # a capture that fails comes last
            for case in cases:
                with precision(case["precision"]):
                    case[kind] = of_native(work.variants()["native"])
    return cases


def once(work: Work) -> None:
    """Native in both precisions."""
    for name in PRECISIONS:
        with precision(name):
            work.variants()["native"]()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=["ceilings", *families()])
    parser.add_argument("network")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--once", action="store_true", help="call native once, and measure nothing")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cpu") if arguments.dry else torch.device("cuda", 0)
    torch.manual_seed(0)
    start = time.monotonic()
    if arguments.once:
        once(families()[arguments.family](work_sets(arguments.dry)[arguments.network], device))
        return
    if arguments.out is None:
        parser.error("--out FILE is missing")
    if arguments.family == "ceilings":
        write_json(arguments.out, ceilings(device, arguments.dry))
        return
    cases = measured(arguments.family, arguments.network, device, arguments.dry)
    write_json(arguments.out, {"cases": cases})
    times = {name: f"{1e3 * value['median']:.4g}" for name, value in cases[-1]["variants"].items()}
    print(f"{cases[-1]['precision']}, ms: {times}; measured in {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    main()
