"""Programs of tests/native, built where the extension was built."""

import fcntl
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

from kfac_ext import _C


@pytest.fixture(scope="session")
def build_target():
    """build_target(name) compiles a CMake target and returns the folder that it lies in."""
    folder = Path(_C.build_directory())
    cache = folder / "CMakeCache.txt"
    if not cache.exists():
        pytest.skip(f"the extension's build folder {folder} is not there")
    entries = dict(re.findall(r"^(\w+):\w+=(.*)$", cache.read_text(), flags=re.M))
    if not Path(entries["CMAKE_COMMAND"]).exists() or not Path(entries["CMAKE_MAKE_PROGRAM"]).exists():
        pytest.skip("the cmake or ninja that built the extension is not there")

    def build(target):
        command = [entries["CMAKE_COMMAND"], "--build", str(folder), "--target", target]
        with (folder / "tests.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two processes that run tests must not build in one folder at once
            run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
        return folder / "csrc/native"

    return build


@pytest.fixture(scope="session")
def emulation(build_target):
    """The module that runs CUDA kernels with simulated threads."""
    (path,) = build_target("kfac_emulation").glob("kfac_emulation*.so")
    spec = importlib.util.spec_from_file_location("kfac_emulation", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
