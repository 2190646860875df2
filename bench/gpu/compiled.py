"""Print registers, spills and shared memory of every CUDA kernel, and what the schedules of the work sets count.

    python -m bench.gpu.compiled [--write docs/kernels.md]

The first table is what ptxas reported when the kernels were compiled (needs nvcc then) and, by a cuobjdump,
what `bench.gpu.sass` counts in their machine code; `bench.gpu.counts` has the others. `--write` puts them between the
markers of that file. Fails where a kernel is beyond its bound in `bench.gpu.bounds`. No GPU is asked.
"""

from __future__ import annotations

import argparse
import ctypes
import re
from pathlib import Path
from typing import NamedTuple

from bench import documents
from bench.gpu import sass
from bench.gpu.bounds import ARCHITECTURE, passed_bounds
from bench.gpu.counts import algebra_table, covariance_table
from kfac_ext import _C

# of a multiprocessor: shared memory for blocks and what each block takes on top, in bytes
SHARED_BYTES = {"sm_80": 164 << 10, "sm_86": 100 << 10, "sm_89": 100 << 10, "sm_90": 228 << 10}
RESERVED_BYTES = 1024
REGISTERS, THREADS = 65536, {"sm_86": 1536, "sm_89": 1536}


class Kernel(NamedTuple):
    """One kernel compiled for one architecture."""

    name: str
    architecture: str
    registers: int
    spill_stores: int
    spill_loads: int


def demangled(symbol: str) -> str:
    """A C++ symbol in words: `covariance_tiles_kernel<0>`."""
    demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    demangle.restype = ctypes.c_char_p
    text = demangle(symbol.encode(), None, None, None).decode()
    text = re.sub(r"\(\w+::\w+\)", "", text)  # the types of enumerators
    return re.search(r"\w+_kernel(?:<[^>]*>)?", text)[0]


def kernels(report: str) -> list[Kernel]:
    """What one ptxas report says."""
    pattern = (
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    found = re.findall(pattern, report, flags=re.S)
    return [Kernel(demangled(symbol), arch, int(regs), int(st), int(ld)) for symbol, arch, st, ld, regs in found]


def resident_blocks(kernel: Kernel, threads: int, shared: int) -> int:
    """Blocks that fit on one multiprocessor by registers, shared memory and threads."""
    by_registers = REGISTERS // (-(-kernel.registers // 8) * 8 * threads)
    by_shared = SHARED_BYTES.get(kernel.architecture, 48 << 10) // (shared + RESERVED_BYTES)
    return min(by_registers, by_shared, THREADS.get(kernel.architecture, 2048) // threads)


def reported() -> list[Kernel]:
    """All kernels of this build, for every architecture.

    Raises:
        SystemExit: there are none.
    """
    reports = sorted(_objects().glob("*.report"))
    if not reports:
        raise SystemExit(f"no report under {_objects()}: this build has no CUDA kernels (configure with KFAC_CUDA=1)")
    return sorted(kernel for report in reports for kernel in kernels(report.read_text()))


def _objects() -> Path:
    return Path(_C.build_directory()) / "csrc/CMakeFiles/kfac_cuda.dir/cuda"


def machine_code() -> dict[str, sass.Counts]:
    """Kernel of the bounds' architecture -> what is counted in it; nothing without a cuobjdump."""
    program = sass.cuobjdump()
    if program is None:
        return {}
    found: dict[str, sass.Counts] = {}
    for file in sorted(_objects().glob("*.o")):
        for part in sass.listing(program, file).split("Fatbin elf code:"):
            if f"arch = {ARCHITECTURE}" in part:
                found |= {demangled(symbol): counts for symbol, counts in sass.functions(part).items()}
    return found


def beyond() -> list[str]:
    """What kernels are beyond their bounds."""
    counted = machine_code()
    return [
        line
        for k in reported()
        if k.architecture == ARCHITECTURE
        for line in passed_bounds(k.name, k.registers, k.spill_stores + k.spill_loads, counted.get(k.name))
    ]


def table() -> str:
    """The Markdown table of all kernels of this build."""
    launch = {name: (threads, shared) for name, threads, shared in _C.cuda_kernels()}
    counted = machine_code()
    head = (
        "kernel",
        "for",
        "registers",
        "spilled bytes (stores, loads)",
        "shared bytes",
        "threads",
        "blocks per SM",
        "divisions, loads a stage, loads before a store",
    )
    rows = []
    for kernel in reported():
        threads, shared = launch[kernel.name]
        counts = counted.get(kernel.name) if kernel.architecture == ARCHITECTURE else None
        spilled = f"{kernel.spill_stores}, {kernel.spill_loads}"
        blocks = resident_blocks(kernel, threads, shared)
        counted_here = "" if counts is None else ", ".join(map(str, counts))
        of_kernel = (f"`{kernel.name}`", kernel.architecture, kernel.registers, spilled, shared, threads, blocks)
        rows.append((*of_kernel, counted_here))
    return "\n".join([f"nvcc {_C.cuda_compiler}", "", *documents.table(head, rows, "llr")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if sass.cuobjdump() is None:  # half of the bounds would hold unseen
        raise SystemExit("no cuobjdump, which shows the machine code: pip install --group cuda")
    tables = {"cuda-report": table(), "cuda-counts": covariance_table(), "cuda-algebra-counts": algebra_table()}
    print("\n\n".join(tables.values()))
    for marker, text in tables.items() if arguments.write else ():
        documents.replace_between(arguments.write, marker, text)
    if lines := beyond():
        raise SystemExit("beyond its bound:\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
