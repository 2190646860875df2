"""`python -m bench.hard.sanitize address|thread`: builds with sanitizers, runs programs and calls, shows reports.

The build is a folder of its own, build/sanitize-*, with a copy of the package in links whose compiled module it is.
Children report into files: what they print is dropped. Families that limit memory are left out, as the sanitizers map
terabytes of it.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from bench.gpu.check import PROGRAMS

ROOT = Path(__file__).parents[2]
SUPPRESSIONS = Path(__file__).with_name("suppressions.txt")
FAMILIES = ("valid", "hostile")

# The simulated GPU's threads are fibers of one thread: nothing for ThreadSanitizer.
_PROGRAMS = {"address": PROGRAMS, "thread": {}}
# The package stays first among the modules. ThreadSanitizer ends forks that begin threads: their ids were there before.
_PYTEST = ("-q", "-p", "no:cacheprovider", "--import-mode=append", "-k", "not forks")
_USES = """
import importlib.util, sys
found = importlib.util.find_spec("kfac_ext").origin
sys.exit(None if found.startswith(sys.argv[1]) else f"{found} is used")
"""
_LIBRARIES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}


def main(arguments: list[str] | None = None) -> int:
    """Build, run, show; 1 if anything was reported or a run failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.hard.sanitize", description=__doc__.split("\n", 1)[0])
    parser.add_argument("sanitizer", choices=tuple(_PROGRAMS))
    parser.add_argument("--cases", type=int, default=1000, help="of each family")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    folder = ROOT / f"build/sanitize-{asked.sanitizer}"
    package = folder / "package"  # where commands run: Python looks for modules there first
    build(folder, asked.sanitizer)
    reports = folder / "reports"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir()
    environment = environment_of(asked.sanitizer, folder, reports)
    commands = commands_of(asked.sanitizer, folder, ["--cases", str(asked.cases), "--seed", str(asked.seed)])
    failed = [
        " ".join(command) for command in commands if subprocess.run(command, cwd=package, env=environment).returncode
    ]
    for command in failed:
        print(f"failed: {command}")
    found = sorted(reports.iterdir())
    for path in found[:5]:
        print(path.read_text(errors="replace")[:4000])
    print(f"{len(found)} reports in {reports}, {len(failed)} of {len(commands)} commands failed")
    return 1 if failed or found else 0


def commands_of(sanitizer: str, folder: Path, limits: list[str]) -> list[list[str]]:
    """What is run: programs, a look whether Python finds this build's module, random calls."""
    commands = [[str(folder / f"csrc/native/{name}"), *cases] for name, cases in _PROGRAMS[sanitizer].items()]
    commands.append([sys.executable, "-c", _USES, str(folder)])
    commands.append([sys.executable, "-m", "bench.hard", *FAMILIES, *limits])
    if sanitizer == "thread":
        commands.append([sys.executable, "-m", "pytest", *_PYTEST, str(ROOT / "tests/ops/test_threads.py")])
    return commands


def build(folder: Path, sanitizer: str) -> None:
    """Compile the module and the programs, and lay the package out around the module."""
    import pybind11

    package = folder / "package/kfac_ext"
    options = {
        "CMAKE_BUILD_TYPE": "RelWithDebInfo",
        "KFAC_SANITIZE": sanitizer,
        "KFAC_CUDA": "OFF",
        "KFAC_MODULE_DIRECTORY": package,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    configure = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *(f"-D{k}={v}" for k, v in options.items())]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", folder, "--target", "_C", *_PROGRAMS[sanitizer]], check=True)
    for source in (ROOT / "kfac_ext").rglob("*.py"):
        link = package / source.relative_to(ROOT / "kfac_ext")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(source)


def environment_of(sanitizer: str, folder: Path, reports: Path) -> dict[str, str]:
    """Where Python finds the module, and what the sanitizer's runtime, which must be loaded first, is told."""
    libraries = [_compilers(name) for name in (*_LIBRARIES[sanitizer], "libstdc++.so.6")]
    report = f"log_path={reports}/report"
    options = {
        # Python keeps what it has at its end; torch allocates with operator new and frees with free
        "ASAN_OPTIONS": f"{report}:detect_leaks=0:alloc_dealloc_mismatch=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": f"{report}:print_stacktrace=1",
        "TSAN_OPTIONS": f"{report}:die_after_fork=0:ignore_noninstrumented_modules=1:suppressions={SUPPRESSIONS}",
        "LD_PRELOAD": ":".join(libraries),
        "PYTHONPATH": f"{folder / 'package'}:{ROOT}:{ROOT / 'python'}",
        "OMP_NUM_THREADS": "1",
    }
    return {**os.environ, **options}


def _compilers(library: str) -> str:
    run = subprocess.run(["c++", f"-print-file-name={library}"], capture_output=True, text=True, check=True)
    return str(Path(run.stdout.strip()).resolve())


if __name__ == "__main__":
    sys.exit(main())
