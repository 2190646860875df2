"""What a machine with a GPU can tell about the CUDA kernels: `make gpu-check`, then `make gpu-bench`.

    python -m bench.gpu check [--dry]     # builds, tests, sanitizes; ends in a table of what passed; 5 minutes at most
    python -m bench.gpu bench [--dry]     # times, training steps, a run; 6 minutes at most

Needs no network. Every step is a process of its own with a limit of its own, whose whole log is kept; what would not
end in time is left out. gpu-check.json or gpu-bench.json is written anew after every step, into the folder $OUT, or
build/gpu; `python -m bench.report FILE` makes the tables of docs/kernels.md of the latter.
`--dry` tries the script on the CPU, with tiny sizes and without building.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from bench.gpu import bench, check
from bench.gpu.run import Run
from bench.gpu.table import results_table
from bench.machine import ROOT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("check", "bench"):
        commands.add_parser(name).add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    arguments = parser.parse_args()
    folder = Path(os.environ.get("OUT") or ROOT / "build" / "gpu")
    raise SystemExit(_run(arguments.command, folder, arguments.dry))


def _run(command: str, folder: Path, dry: bool) -> int:
    """The exit code."""
    minutes, work = (check.MINUTES, check.check) if command == "check" else (bench.MINUTES, bench.bench)
    run = Run(folder, f"gpu-{command}{'-dry' if dry else ''}", 60.0 if dry else minutes, quick=dry)
    try:
        work(run, dry)
    finally:
        run.finish()
        print(check.outcome_table(run), flush=True)
    if command == "bench" and "cpu" in run.document["machine"]:
        print(results_table(run.document))
    return 1 if run.failed() else 0


if __name__ == "__main__":
    main()
