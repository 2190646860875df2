"""Builds the extension by running CMake; which sources there are and how they compile is CMake's business alone.

Environment: KFAC_CUDA=1 for CUDA kernels too (minutes more, needs an nvcc), KFAC_CUDA_ARCHITECTURES for which of them
("80-real;90" by default, as CMake has them), CMAKE_ARGS (passed on).
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# fixed, so that an editable rebuild compiles only what changed
BUILD = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"


class CMakeBuild(build_ext):
    """`build_ext` that configures and builds the one CMake target `_C`."""

    def build_extension(self, ext: Extension) -> None:
        """Configure and build into the fixed build folder."""
        import pybind11

        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        # an editable build writes next to the sources, so that a plain `cmake --build` refreshes it too
        target = ROOT / "kfac_ext" / module.name if self.editable_mode else module
        architectures = os.environ.get("KFAC_CUDA_ARCHITECTURES")
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DKFAC_CUDA={os.environ.get('KFAC_CUDA', 'OFF')}",
            *([f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"] if architectures else []),
            f"-DKFAC_MODULE_DIRECTORY={target.parent}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        start = time.monotonic()
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(BUILD), "--target", "_C"], check=True)
        print(f"kfac_ext._C: built in {time.monotonic() - start:.0f} s")
        if target != module:
            module.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(target, module)


setup(license="MIT", ext_modules=[Extension("kfac_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
