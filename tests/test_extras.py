"""What is missing is said with the line that installs it; the packages themselves need torch and numpy alone."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from flatprune.errors import InputError
from flatprune.extras import EXTRAS, needed_by

ROOT = Path(__file__).parents[1]
# importing one of them fails as if it were not installed
WITHOUT = f"""
import sys
for package in {sorted(EXTRAS)}:
    sys.modules[package] = None
"""


def without_extras(code):
    return subprocess.run([sys.executable, "-c", WITHOUT + code], capture_output=True, text=True)


def test_base_alone_imports_both_packages():
    run = without_extras(
        "import flatprune, kfac_ext, torch\n"
        "curvature = flatprune.Curvature(torch.nn.Linear(2, 2))\n"
        "try: flatprune.Pruner\n"
        "except ImportError as error: print(error)"
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "flatprune.Pruner needs scipy, which is not installed: pip install 'kfac-ext[prune]'\n"


def test_the_command_says_what_it_needs():
    run = without_extras("sys.argv[1:] = ['--help']\nfrom flatprune.__main__ import main\nsys.exit(main())")
    assert run.returncode == 2 and not run.stdout
    assert run.stderr == (
        "flatprune: the command line needs typer, which is not installed: pip install 'kfac-ext[cli]'\n"
    )


def test_other_failures_stay_what_they_are():
    with pytest.raises(ModuleNotFoundError, match="no_such_module") as caught, needed_by("this"):
        import no_such_module  # noqa: F401
    assert not isinstance(caught.value, InputError)


def test_every_extra_is_declared_with_its_packages():
    text = (ROOT / "pyproject.toml").read_text()
    declared = dict(re.findall(r"^([a-z]+) = \[(.*)\]", text, flags=re.M))
    names = {"yaml": "pyyaml", "sklearn": "scikit-learn", "PIL": "pillow"}
    for package, extra in EXTRAS.items():
        assert f'"{names.get(package, package)}"' in declared[extra], package
