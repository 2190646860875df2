"""`make gpu-check`: the build, each program of tests/native alone, the CUDA tests file by file, sanitizers."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from bench.gpu.run import Run, Step
from bench.machine import ROOT

MINUTES = 4.8
PROGRAMS = {  # program of tests/native -> its small cases
    "covariance_emulation": ("kinds", "offsets"),
    "greedy_emulation": ("failing", "steps", "wide"),
    "inverse_emulation": ("small", "failing", "failing_large", "pi"),
    "power_iteration_emulation": ("kinds", "sizes"),
    "power_iteration_covariance_emulation": ("failing", "kinds"),
    "saliency_emulation": ("failing", "sizes"),
}
TESTS = (  # the longest first
    "tests/training/test_training_cuda.py",
    "tests/distributed/test_gpus.py",
    *(f"tests/ops/test_{name}.py" for name in ("factors_cuda", "covariance_cuda", "refusals_cuda")),
    *(f"tests/ops/test_{name}.py" for name in ("covariance", "inverse", "power", "saliency", "greedy")),
    *(f"tests/ops/test_{name}.py" for name in ("covariance_group", "covariance_inputs", "autocast")),
    "tests/pruning/test_pruner.py",
)
# initcheck would report copies of padding back to the host
SANITIZERS = {"memcheck": 45.0, "synccheck": 25.0, "racecheck": 40.0, "initcheck": 25.0}  # seconds
AT_ONCE = 4  # nothing is timed: processes share the device
_OPTIONS = ("-o", "addopts=", "-o", "faulthandler_timeout=60", "-v", "-rs", "--tb=short", "-k", "cuda or gpus")
_PLUGINS = ("-p", "no:cacheprovider", "-p", "bench.gpu.tell")


def build(capability: str) -> Step:
    """Install in place for this device alone, without network; what was built before is kept."""
    install = ("-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--editable", ".")
    environment = {
        "KFAC_CUDA": "1",
        "KFAC_CUDA_ARCHITECTURES": f"{capability.replace('.', '')}-real",
        "CMAKE_BUILD_PARALLEL_LEVEL": str(min(16, os.cpu_count() or 1)),
        "PIP_BREAK_SYSTEM_PACKAGES": "1",  # the machine is lent
    }
    return Step("build", (sys.executable, *install), 170, environment=environment)


def machine(name: str, *options: str) -> Step:
    """The device, and with `--built` whether the kernels' own checks are passed."""
    return Step(name, (sys.executable, "-m", "bench.gpu.machine", *options), 60, writes=True)


def begin(run: Run, dry: bool) -> Path:
    """Find the device, build, check; where it was built.

    Raises:
        SystemExit: there is no device, or the build failed.
    """
    if not dry:
        found = run.step(machine("device"))
        device = (found or {}).get("result", {})
        if "device" not in device:
            raise SystemExit("no CUDA device; `--dry` tries the script without one")
        run.keep("machine", device)
        outcome = run.step(build(device["capability"]))
        if outcome is None or outcome["exit"]:
            raise SystemExit(f"the build failed, see {run.folder}/logs/build.log")
    found = run.step(machine("own checks", "--built"))
    result = (found or {}).get("result")
    if result is None:
        raise SystemExit(f"the build cannot be used, see {run.folder}/logs")
    run.keep("machine", result)
    return ROOT / result["build_directory"]


def check(run: Run, dry: bool) -> None:
    """All of it, what is most wanted first."""
    folder = begin(run, dry)
    cmake = shutil.which("cmake") or "cmake"
    jobs = str(min(16, os.cpu_count() or 1))
    if not dry:
        run.step(Step("build programs", (cmake, "--build", str(folder), "-j", jobs, "--target", "emulations"), 120))
    run.steps(alone(folder / "csrc/native", dry), AT_ONCE)
    run.steps(tests(dry), 1 if dry else AT_ONCE)
    if not dry:
        run.steps(sanitized(folder / "csrc/native"), AT_ONCE)


def alone(folder: Path, dry: bool) -> list[Step]:
    """Every program against its float64 oracle; a dry run simulates the threads, where there is a program."""
    device = () if dry else ("--device",)
    programs = [p for p in PROGRAMS if not dry or (folder / p).exists()]
    return [Step(f"{p}, alone", (str(folder / p), *device, *PROGRAMS[p]), 20) for p in programs]


def tests(dry: bool) -> list[Step]:
    """The CUDA half of the tests, a process a file; a dry run finds out that they can be collected."""
    needs = ("pytest", "hypothesis")
    pytest = (sys.executable, "-m", "pytest", *_OPTIONS, *_PLUGINS, *(("--collect-only",) if dry else ()))
    threads = {"OMP_NUM_THREADS": "2"}
    return [Step(name, (*pytest, name), 75, needs=needs, environment=threads) for name in TESTS]


def sanitized(folder: Path) -> list[Step]:
    """Every program, and the kernels' own checks, under memcheck; then under the other tools."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    own = (sys.executable, "-m", "bench.gpu.machine", "--built")
    steps = []
    for name, limit in SANITIZERS.items():
        words = (tool, "--tool", name, "--error-exitcode", "9", "--print-limit", "20")
        steps += [
            Step(f"{p}, {name}", (*words, str(folder / p), "--device", *cases), limit) for p, cases in PROGRAMS.items()
        ]
        if name == "memcheck":
            steps.append(Step("own checks, memcheck", (*words, *own), 60, writes=True))
    return steps


def outcome_table(run: Run) -> str:
    """What passed, in lines; what did not, first."""
    steps = run.document["steps"]
    rows = [("FAILED" if o["exit"] else "passed", name, o) for name, o in steps.items()]
    lines = [
        f"{word}  {o['seconds']:6.1f} s  {name}: {o['last']}" for word, name, o in sorted(rows, key=lambda r: r[0])
    ]
    lines += [f"left out         {name}: {why}" for name, why in run.document["left_out"].items()]
    count = len(run.failed())
    return "\n".join([*lines, f"{len(steps) - count} passed, {count} failed; {run.path}"])
