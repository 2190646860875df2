"""The device and its driver; once built, also the machine, versions and how the kernels' own checks came out.

python -m bench.gpu.machine [--built] --out FILE
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from bench.documents import write_json
from bench.machine import ROOT, device, machine


def built() -> dict[str, Any]:
    """The machine, what was built, and whether the check of each family is passed on this device."""
    import kfac_ext
    from kfac_ext import _C
    from kfac_ext.ops._cuda import cuda_serves, families

    if torch.cuda.is_available():
        for family in families():
            cuda_serves(family, family, torch.empty(0, device="cuda:0"))
    info = {"build_directory": os.path.relpath(_C.build_directory(), ROOT), "build": kfac_ext.build_info()}
    return machine() | device() | info


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--built", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    info = built() if arguments.built else {"torch": torch.__version__, **device()}
    write_json(arguments.out, info)
    checks = info.get("build", {}).get("cuda_checks", {})
    print(info.get("device", "no CUDA device"), *(f"{name}: {verdict};" for name, verdict in checks.items()))
    raise SystemExit(any(verdict != "ok" for verdict in checks.values()))


if __name__ == "__main__":
    main()
