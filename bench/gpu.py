"""Everything a machine with a GPU can tell about the CUDA kernels, in one JSON: build, tests, sanitizers, benchmarks.

    python -m bench.gpu [--out FILE] [--minutes 9] [--skip build,tests,bench,sanitizer]
    python -m bench.gpu --dry          # tries the script without a GPU: tiny sizes on the CPU, no build, no sanitizer
    python -m bench.gpu --table FILE   # writes the tables of docs/kernels.md from a JSON

Needs no network. Every step has a limit of its own; what would not end within `--minutes` is left out, and the JSON,
written after every step, says so. Without `--out` it goes to the folder $OUT, or to bench/results.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from bench.gpu_checks import build, sanitizer, tests
from bench.gpu_run import ROOT, Run

if TYPE_CHECKING:
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


def work_sets(quick: bool) -> dict[str, list[Any]]:
    """The four networks; in a dry run the distinct kinds of their layers, small."""
    from bench import worksets as w

    full = {
        "VGG19 b128": w.vgg(128, w.VGG19),
        "ResNet32 b128": w.resnet(128, 5),
        "ResNet50 b32": w.resnet50(32),
        "MLP b256": w.mlp(256),
    }
    if not quick:
        return full
    small = {}
    for name, layers in full.items():
        kinds = {(i.kernel, i.stride, i.is_convolution): i for i in layers}
        small[name] = [
            i._replace(batch=2, channels=min(i.channels, 12), outputs=min(i.outputs, 12), size=min(i.size, 10))
            for i in kinds.values()
        ]
    return small


def families() -> dict[str, type[Work]]:
    """Name -> what is measured of a network."""
    from bench import gpu_linear_algebra as algebra
    from bench.gpu_covariance import Covariances

    return {
        "covariance": Covariances,
        "inverses": algebra.Inverses,
        "power iteration": algebra.PowerIterations,
        "matrix-free power iteration": algebra.MatrixFree,
        "saliency": algebra.Saliencies,
    }


def measured(work: Work, device: torch.device, rounds: int, seconds: float) -> dict[str, Any]:
    """In both precisions: milliseconds of each variant, error of the native one."""
    from bench.gpu_measure import PRECISIONS, alternate, precision

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


def shares(entry: dict[str, Any], reached: dict[str, float]) -> dict[str, dict[str, float]]:
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
    from bench.gpu_measure import ceilings

    run.keep("ceilings", ceilings(device, quick))
    results: dict[str, Any] = {}
    waiting = [(family, name) for family in families() for name in work_sets(quick)]
    for place, (family, name) in enumerate(waiting):
        if run.seconds_left() < 5:
            run.document["left_out"].append(f"{family}, {name}")
            continue
        print(f"[{run.seconds_left():4.0f} s left] {family}, {name}", flush=True)
        share = run.seconds_left() / (len(waiting) - place)
        work_set = work_sets(quick)[name]
        try:
            entry = measured(families()[family](work_set, device), device, 2 if quick else ROUNDS, share)
        except RuntimeError as error:  # out of memory, a kernel that cannot start: the rest is still of use
            run.document.setdefault("failed", []).append(f"{family}, {name}: {str(error).splitlines()[0]}")
            continue
        entry |= {"ratios": ratios(entry), "shares": shares(entry, run.document["ceilings"])}
        results.setdefault(family, {})[name] = entry
        run.keep("results", results)


def machine(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions, commit."""
    import torch

    import kfac_ext
    from bench.results import commit, cpu_name

    info: dict[str, Any] = {"cpu": cpu_name(), "commit": commit(), "build": kfac_ext.build_info()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
        info |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "driver": driver,
            "torch_cuda": torch.version.cuda,
        }
    return info


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="default bench/results/gpu-<device>.json")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--skip", default="", help="steps to leave out, separated by commas")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--table", type=Path, metavar="FILE", help="only write docs/kernels.md's table from this JSON")
    arguments = parser.parse_args()
    if arguments.table:
        from bench.cuda_report import replace_between
        from bench.gpu_table import results_table

        replace_between(ROOT / "docs/kernels.md", "gpu-results", results_table(json.loads(arguments.table.read_text())))
        return
    if not arguments.dry and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; `--dry` tries the script without one")
    device = torch.device("cpu" if arguments.dry else "cuda", None if arguments.dry else 0)
    name = "dry" if arguments.dry else re.sub(r"\W+", "-", torch.cuda.get_device_name().lower())
    folder = Path(os.environ.get("OUT") or ROOT / ("build" if arguments.dry else "bench/results"))
    run = Run(arguments.out or folder / f"gpu-{name}.json", arguments.minutes)
    skipped = set(arguments.skip.split(",")) | ({"build", "tests", "sanitizer"} if arguments.dry else set())
    if "build" not in skipped:
        run.begin("build")
        build(run)  # before kfac_ext is imported
    run.keep("machine", machine(device))
    steps = {"tests": tests, "bench": lambda run: bench(run, device, arguments.dry), "sanitizer": sanitizer}
    for step, work in steps.items():
        if step not in skipped:
            run.begin(step)
            work(run)
    if "results" in run.document:
        from bench.gpu_table import results_table

        print(results_table(run.document))
    run.keep("machine", machine(device))  # now with the outcome of the kernels' own checks
    run.keep("finished", time.strftime("%Y-%m-%d %H:%M:%S"))
    failed = [
        f"{part} {name}" for part in ("tests", "sanitizer") for name, code in _exits(run.document.get(part)) if code
    ]
    failed += run.document.get("failed", [])
    print(f"{run.path}: {'failed: ' + ', '.join(failed) if failed else 'all steps passed'}")
    raise SystemExit(1 if failed else 0)


def _exits(outcome: dict[str, Any] | None) -> list[tuple[str, int | None]]:
    if outcome is None:
        return []
    if "exit" in outcome:
        return [("", outcome["exit"])]
    return [(name, step["exit"]) for name, step in outcome.items()]


if __name__ == "__main__":
    main()
