"""The steps of `bench.gpu` that are passed or failed: build, tests, sanitizers."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path

from bench.gpu.run import Run

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZED = {  # program of tests/native -> its small cases
    "covariance_emulation": ("kinds",),
    "power_iteration_emulation": ("kinds", "sizes"),
    "power_iteration_covariance_emulation": ("failing", "kinds"),
    "inverse_emulation": ("small", "failing", "failing_large", "pi"),
    "saliency_emulation": ("failing", "sizes"),
}
_COVARIANCES = ("covariance", "covariance_group", "covariance_cuda", "factors_cuda")
_OPERATIONS = (*_COVARIANCES, "power", "inverse", "saliency", "greedy")
TESTS = (*(f"tests/ops/test_{name}.py" for name in _OPERATIONS), "tests/training/test_training_cuda.py")


def build(run: Run) -> None:
    """Install in place with KFAC_CUDA=ON, without network, and build the emulation's cases for the GPU."""
    install = ("-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--editable", ".")
    outcome = {"install": run.command("build", sys.executable, *install, KFAC_CUDA="ON")}
    if outcome["install"]["exit"]:
        run.keep("build", outcome)
        raise SystemExit("the build failed")
    code = "from kfac_ext import _C; print(_C.build_directory())"
    folder = run.command("build folder", sys.executable, "-c", code)["output"].split()[-1]
    cmake = shutil.which("cmake") or "cmake"
    outcome["cases"] = run.command("build cases", cmake, "--build", folder, "--target", "emulations")
    run.keep("build", outcome)


def tests(run: Run) -> None:
    """The CUDA half of the tests."""
    if importlib.util.find_spec("pytest") is None or importlib.util.find_spec("hypothesis") is None:
        run.document["left_out"].append("tests: pytest or hypothesis is not installed")
        return
    outcome = run.command("tests", sys.executable, "-m", "pytest", "-q", "-rs", "-k", "cuda", *TESTS)
    counts = re.findall(r"(\d+) (passed|failed|skipped|error)", outcome["output"])
    run.keep("tests", outcome | {kind: int(count) for count, kind in counts})


def sanitizer(run: Run) -> None:
    """Small cases, without Python: first alone, against the float64 oracle, then under each tool."""
    from kfac_ext import _C

    folder = Path(_C.build_directory()) / "csrc"
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    tools: dict[str, tuple[str, ...]] = {"alone": ()}
    if Path(found).exists():
        # initcheck would report copies of padding back to the host
        tools |= {name: (found, "--tool", name, "--error-exitcode", "9") for name in TOOLS}
    else:
        run.document["left_out"].append("sanitizer: compute-sanitizer is not installed")
    outcome = {}
    for tool, prefix in tools.items():
        for program, cases in SANITIZED.items():
            name = f"{tool}, {program}"
            if run.seconds_left() < 10:
                run.document["left_out"].append(name)
                continue
            outcome[name] = run.command(name, *prefix, str(folder / program), "--device", *cases)
            run.keep("sanitizer", outcome)
