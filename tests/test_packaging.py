"""The house rules that a change could break without any other test noticing."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flatprune.errors

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


# Each line may import what stands in the lines above it, and nothing else of `flatprune` but its own package.
LAYERS = (
    {"distributed", "errors", "moved", "signals"},
    {"extras", "faults", "named"},
    {"files"},
    {"checkpoint", "data", "models"},
    {"coupling"},
    {"cutting"},
    {"criteria", "export", "flatness"},
    {"pruning"},
    {"inspection", "prune_while_training"},
    {"integrations"},
    {"settings"},
    {"values"},
    {"training"},
    {"reporting"},
    {"runs"},
    {"execution"},
    {"study"},
    {"tuning"},
    {"cli"},
    {"__main__"},
)
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names}
MODULES = {
    ".".join(path.relative_to(ROOT / "python").with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.glob("python/flatprune/**/*.py")
}


def imported_modules(name):
    """Modules of flatprune that a module imports anywhere in its text, for types alone too."""
    for found in imported(MODULES[name]):
        while found not in MODULES and "." in found:
            found = found.rpartition(".")[0]
        if found in MODULES and found != "flatprune":
            yield found


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"flatprune"}))
def test_imports_go_one_way(name):
    own = name.split(".")[1]
    for found in imported_modules(name):
        other = found.split(".")[1]
        assert other == own or RANKS[other] < RANKS[own], f"{name} imports {found}"


def test_no_modules_import_each_other_in_a_circle():
    done = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for found in imported_modules(name):
                visit(found, [*path, name])
            done.add(name)

    for name in MODULES:
        visit(name, [])


def test_the_core_is_free_of_torch_and_python():
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert sources
    for source in sources:
        includes = re.findall(r'#include [<"](.*)[>"]', source.read_text())
        assert not any(name.startswith(("torch/", "ATen/", "c10/")) for name in includes), source
        if source.parent.name != "bindings":
            assert not any(name.startswith(("pybind11", "Python.h")) for name in includes), source


def test_names_of_tests_are_short():
    named = [
        (path.relative_to(ROOT), node.name)
        for path in ROOT.glob("tests/**/test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert named and not [f"{path}: {name}" for path, name in named if len(name) >= 60]


@pytest.mark.parametrize("package", ["flatprune", "kfac_ext"])
def test_the_api_page_has_every_public_name(package):
    pages = [path.read_text() for path in (ROOT / "docs/api").glob("*.md")]  # flatprune shows one of kfac_ext
    shown = {line.rpartition(".")[2] for page in pages for line in page.splitlines() if line.startswith("::: ")}
    names = set(importlib.import_module(package).__all__) - {"__version__", "reference"}
    assert names - shown <= {name for name in names if hasattr(flatprune.errors, name)}


def test_tests_mirror_packages():
    mirrored = [ROOT / "kfac_ext", ROOT / "python/flatprune", ROOT]
    for folder in (path for path in ROOT.glob("tests/*") if any(path.glob("test_*.py")) and path.name != "native"):
        assert any((of / folder.name).is_dir() or (of / f"{folder.name}.py").is_file() for of in mirrored), folder
    for path in ROOT.glob("tests/test_*.py"):
        name = path.stem.removeprefix("test_")
        assert name == "packaging" or any((of / f"{name}.py").is_file() for of in mirrored), path


def test_building_needs_no_torch():
    requires = re.search(r"\[build-system\]\nrequires = \[(.*)\]", (ROOT / "pyproject.toml").read_text())
    assert requires and "torch" not in requires[1]


def test_setup_names_no_source_file():
    assert not re.search(r"\.(cpp|cu)\b", (ROOT / "setup.py").read_text())


def test_build_report():
    run = subprocess.run([sys.executable, "-m", "kfac_ext"], capture_output=True, text=True, check=True)
    assert {"simd", "threads", "cuda_architectures", "native"} <= {line.split()[0] for line in run.stdout.splitlines()}
