"""The house rules that a change could break without any other test noticing."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON_FILES = [*ROOT.glob("kfac_ext/**/*.py"), *ROOT.glob("python/**/*.py")]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: path.name)
def test_only_the_operations_import_the_compiled_module(path):
    uses = any(name.startswith("kfac_ext._C") for name in imported(path))
    assert not uses or path.parent.name == "ops"


@pytest.mark.parametrize("path", [p for p in PYTHON_FILES if "flatprune" not in p.parts], ids=lambda path: path.name)
def test_kfac_ext_does_not_import_flatprune(path):
    assert not any(name.startswith("flatprune") for name in imported(path))


def test_the_core_is_free_of_torch_and_python():
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert sources
    for source in sources:
        includes = re.findall(r'#include [<"](.*)[>"]', source.read_text())
        assert not any(name.startswith(("torch/", "ATen/", "c10/")) for name in includes), source
        if source.parent.name != "bindings":
            assert not any(name.startswith(("pybind11", "Python.h")) for name in includes), source


def test_building_needs_no_torch():
    requires = re.search(r"\[build-system\]\nrequires = \[(.*)\]", (ROOT / "pyproject.toml").read_text())
    assert requires and "torch" not in requires[1]


def test_setup_names_no_source_file():
    assert not re.search(r"\.(cpp|cu)\b", (ROOT / "setup.py").read_text())


def test_build_report():
    run = subprocess.run([sys.executable, "-m", "kfac_ext"], capture_output=True, text=True, check=True)
    assert {"simd", "threads", "cuda_architectures", "native"} <= {line.split()[0] for line in run.stdout.splitlines()}
