"""What a result is measured with: the machine, versions, the commit, and what the machine reaches.

Torch and `kfac_ext` are imported by what asks them: the rest is called before anything is built, too.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PEERS = {  # import name -> distribution
    "asdl": "asdfghjkl",
    "curvlinops": "curvlinops-for-pytorch",
    "nngeometry": "nngeometry",
    "backpack": "backpack-for-pytorch",
    "singd": "singd",
}


def cpu_name() -> str:
    """The processor as the system names it."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the working tree, with '+changes' if tracked sources differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        paths = ["bench/*.py", "csrc", "kfac_ext", "python"]
        return git("rev-parse", "--short=10", "HEAD") + ("+changes" if git("status", "-s", "-uno", *paths) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def load_average() -> float | None:
    """Processes that wanted a core in the last minute, where the system tells."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def version(distribution: str) -> str | None:
    """Its installed version, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """The machine and the versions, without anything that changes from run to run."""
    import torch

    import kfac_ext

    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": kfac_ext.build_info()["simd"],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kfac_ext": kfac_ext.__version__,
        "peers": {name: version(distribution) for name, distribution in PEERS.items()},
    }


def machine_slug() -> str:
    """The processor's name and the instruction set in use, in a file's name."""
    import kfac_ext

    name = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")
    return f"{name}-{kfac_ext.build_info()['simd']}"


def device() -> dict[str, Any]:
    """The GPU that torch finds, its driver and the CUDA of torch; nothing where there is none."""
    import torch

    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": _driver(),
        "torch_cuda": torch.version.cuda,
    }


def _driver() -> str:
    try:
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        return subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.split("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


Best = Callable[[Callable[[], Any]], float]
"""the seconds of a call at its fastest"""


def copy_gbs(best: Best, device: str = "cpu", count: int = 2**24) -> float:
    """What copying floats reaches now, read and written."""
    import torch

    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    return 2e-9 * source.nbytes / best(lambda: target.copy_(source))


def matmul_gflops(best: Best, device: str = "cpu", n: int = 1024) -> float:
    """What a product of two matrices of `n` rows reaches now, in the precision that is set."""
    import torch

    a = torch.randn(n, n, device=device)
    return 2e-9 * n**3 / best(lambda: a @ a)
