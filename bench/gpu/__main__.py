"""Everything a machine with a GPU can tell about the CUDA kernels, in one JSON: build, tests, sanitizers, benchmarks.

    python -m bench.gpu [--out FILE] [--minutes 9] [--skip build,tests,bench,training,sanitizer]
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
from pathlib import Path
from typing import Any

import torch

from bench.gpu.checks import build, sanitizer, tests
from bench.gpu.run import ROOT, Run


def machine(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions, commit."""
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
        from bench.documents import replace_between
        from bench.gpu.table import results_table

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
    steps = {
        "tests": tests,
        "bench": lambda run: _bench(run, device, arguments.dry),
        "training": lambda run: _training(run, device, arguments.dry),
        "sanitizer": sanitizer,
    }
    for step, work in steps.items():
        if step not in skipped:
            run.begin(step)
            work(run)
    if "results" in run.document:
        from bench.gpu.table import results_table

        print(results_table(run.document))
    run.keep("machine", machine(device))  # now with the outcome of the kernels' own checks
    run.keep("finished", time.strftime("%Y-%m-%d %H:%M:%S"))
    failed = [
        f"{part} {name}" for part in ("tests", "sanitizer") for name, code in _exits(run.document.get(part)) if code
    ]
    failed += run.document.get("failed", [])
    print(f"{run.path}: {'failed: ' + ', '.join(failed) if failed else 'all steps passed'}")
    raise SystemExit(1 if failed else 0)


def _bench(run: Run, device: torch.device, quick: bool) -> None:
    from bench.gpu.suite import bench  # imports kfac_ext, which has to be built first

    bench(run, device, quick)


def _training(run: Run, device: torch.device, quick: bool) -> None:
    from bench.gpu.training import bench_training  # likewise

    bench_training(run, device, quick)


def _exits(outcome: dict[str, Any] | None) -> list[tuple[str, int | None]]:
    if outcome is None:
        return []
    if "exit" in outcome:
        return [("", outcome["exit"])]
    return [(name, step["exit"]) for name, step in outcome.items()]


if __name__ == "__main__":
    main()
