"""The machine in words: device and driver; once built, also the commit and how the kernels' own checks came out.

python -m bench.gpu.machine [--built] --out FILE
"""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path
from typing import Any

import torch

from bench.gpu.run import ROOT, write_json


def machine() -> dict[str, Any]:
    """What is known before anything is built; `device` is missing where there is none."""
    info: dict[str, Any] = {"torch": torch.__version__}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        info |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "driver": _driver(),
            "torch_cuda": torch.version.cuda,
        }
    return info


def built() -> dict[str, Any]:
    """What was built, and whether the check of each family is passed on this device."""
    import kfac_ext
    from bench.results import commit, cpu_name
    from kfac_ext import _C
    from kfac_ext.ops._cuda import cuda_serves, families

    if torch.cuda.is_available():
        for family in families():
            cuda_serves(family, family, torch.empty(0, device="cuda:0"))
    info = {"cpu": cpu_name(), "commit": commit(), "build_directory": os.path.relpath(_C.build_directory(), ROOT)}
    return info | {"build": kfac_ext.build_info()}


def _driver() -> str:
    try:
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        return subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.split("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--built", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    info = machine() | (built() if arguments.built else {})
    write_json(arguments.out, info)
    checks = info.get("build", {}).get("cuda_checks", {})
    print(info.get("device", "no CUDA device"), *(f"{name}: {verdict};" for name, verdict in checks.items()))
    raise SystemExit(any(verdict != "ok" for verdict in checks.values()))


if __name__ == "__main__":
    main()
