"""What a user's type checker says: of the examples and README's code nothing, of planted errors each line."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(ROOT.glob("examples/*.py"))
pytestmark = pytest.mark.thorough  # a minute where nothing is cached

GIVEN = """\
import torch
from torch import nn

model: nn.Module = nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x, y, g = torch.randn(8, 4), torch.zeros(8, dtype=torch.long), torch.randn(8, 4)
example_inputs, loader, steps, criterion = x[:2], [(x, y)], 10, nn.CrossEntropyLoss()
loss = criterion(model(x), y)
"""

PLANTED = """\
import kfac_ext
import flatprune

flatprune.PruneWhileTraining(model, optimizer, x, target="0.1", total_steps=steps)  # wrong
flatprune.PruneWhileTraining(model, optimizer, x, target=0.1, total_steps=steps, critereon="taylor")  # wrong
flatprune.PruneWhileTraining(model, optimizer, x, target=0.1, total_steps=steps, criterion="taylor")
flatprune.Target(params="0.1")  # wrong
flatprune.Target(parms=0.1)  # wrong
kfac_ext.damped_inverse([g @ g.T], "1e-3")  # wrong
kfac_ext.gradient_covariance(g, shape=3)  # wrong
kfac_ext.KFACPreconditioner(model, damping="0.1")  # wrong
kfac_ext.KFACPreconditioner(model, dampening=0.1)  # wrong
kfac_ext.KFACPreconditioner(model, damping=0.1)
"""


def mypy(files):
    """(file, line, message) of each error, by mypy --strict; that torch's `backward` is not typed is not the user's."""
    told = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--ignore-missing-imports"]
    environment = {**os.environ, "MYPYPATH": os.pathsep.join((str(ROOT), str(ROOT / "python")))}
    told += [
        "--untyped-calls-exclude=torch",
        "--allow-subclassing-any",  # packages whose classes the examples extend may be missing
        "--config-file=",
        "--scripts-are-modules",
        "--no-error-summary",
        "--show-absolute-path",
    ]
    run = subprocess.run([*told, *map(str, files)], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode in (0, 1), run.stderr or run.stdout
    found = re.findall(r"^(.+?):(\d+): error: (.+)$", run.stdout, re.MULTILINE)
    return [(Path(file), int(line), message) for file, line, message in found]


def pyright(files, folder):
    """The same by pyright in its mode "standard"."""
    paths = {"include": [str(file) for file in files], "extraPaths": [str(ROOT), str(ROOT / "python")]}
    rules = {"typeCheckingMode": "standard", "reportMissingImports": False, "reportMissingModuleSource": False}
    (folder / "pyrightconfig.json").write_text(json.dumps({**paths, **rules}))
    told = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(folder)]
    run = subprocess.run(told, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode in (0, 1), run.stderr or run.stdout
    found = json.loads(run.stdout)["generalDiagnostics"]
    errors = [entry for entry in found if entry["severity"] == "error"]
    return [(Path(e["file"]), e["range"]["start"]["line"] + 1, e["message"]) for e in errors]


@pytest.fixture(scope="module")
def own_files(tmp_path_factory):
    """README's code, and code with errors in it."""
    folder = tmp_path_factory.mktemp("types")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    (folder / "readme.py").write_text(GIVEN + "".join(blocks))
    (folder / "planted.py").write_text(GIVEN + PLANTED)
    return folder / "readme.py", folder / "planted.py"


@pytest.fixture(scope="module", params=["mypy", "basedpyright"])
def errors(request, own_files, tmp_path_factory):
    if find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    files = [*EXAMPLES, *own_files]
    return mypy(files) if request.param == "mypy" else pyright(files, tmp_path_factory.mktemp("pyright"))


def test_examples_and_readme_are_without_errors(errors, own_files):
    assert not [f"{path.name}:{line}: {message}" for path, line, message in errors if path != own_files[1]]


def test_planted_errors_are_found(errors, own_files):
    lines = own_files[1].read_text().splitlines()
    planted = {number for number, line in enumerate(lines, 1) if line.endswith("# wrong")}
    assert {line for path, line, _ in errors if path == own_files[1]} == planted and len(planted) == 8
