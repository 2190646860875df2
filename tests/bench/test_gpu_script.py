"""`make gpu-check` and `make gpu-bench` where there is no GPU: steps that fail and hang, dry runs, tables, reports."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.goals import GPU_GOALS
from bench.gpu import __main__ as script
from bench.gpu import bench, check, suite, training
from bench.gpu import run as runs
from bench.gpu.floor import Floor, share
from bench.gpu.names import FAMILIES, KINDS, NETWORKS, TRAINED
from bench.gpu.networks import work_sets
from bench.gpu.run import Run, Step
from bench.gpu.table import results_table
from bench.machine import ROOT, machine
from bench.results import load
from tests.found_couplings import couplings_are_kept

CPU = torch.device("cpu")


def python(name, code, limit=20.0, **options):
    return Step(name, (sys.executable, "-c", code), limit, **options)


# a family as `python -m bench.gpu.suite` is one, without its seconds of imports
WRITES = "import sys, pathlib; pathlib.Path(sys.argv[-1]).write_text('{\"good\": 1}'); "
MEASURES = WRITES.replace("good", "cases").replace(": 1", ': [{"suite": "s", "name": "n"}]')


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_SHORTEST", 0.1)
    return Run(tmp_path, "gpu-test", minutes=1)


@pytest.mark.thorough
def test_a_family_that_fails_and_one_that_hangs(run):
    """What comes after them is measured, and the JSON says of each how it ended."""
    hangs = "import torch, time; print('begun', flush=True); time.sleep(60)"
    steps = [
        python("good", WRITES, writes=True),
        python("failing", WRITES + "raise TypeError('no such thing')", writes=True),
        python("hanging", hangs, limit=8.0),
        python("dying", MEASURES + "import os; os.abort()", writes=True),
        Step("absent", ("/no/such/program",), 5.0),
        python("last", "print('still here')"),
    ]
    start = time.monotonic()
    run.steps(steps)
    assert time.monotonic() - start < 50
    document = json.loads(run.path.read_text())
    exits = {name: outcome["exit"] for name, outcome in document["steps"].items()}
    assert exits == {"good": 0, "failing": 1, "hanging": 124, "dying": -6, "absent": 127, "last": 0}
    assert run.failed() == ["failing", "hanging", "dying", "absent"]
    assert document["steps"]["good"]["result"] == document["steps"]["failing"]["result"] == {"good": 1}
    assert [case["name"] for case in document["cases"]] == ["n"] and document["steps"]["dying"]["result"] == {}
    assert document["steps"]["failing"]["last"] == "TypeError: no such thing"
    log = (run.folder / document["steps"]["hanging"]["log"]).read_text()
    assert "begun" in log and 'File "<string>", line 1 in <module>' in log  # where it hung
    table = check.outcome_table(run)
    assert "2 passed, 4 failed" in table and table.index("FAILED") < table.index("passed")


def test_what_a_step_has_started_ends_with_it(run):
    outcome = run.step(Step("sleep", ("bash", "-c", "echo begun; sleep 61 & echo $!; wait"), 1.0))
    child = (run.folder / outcome["log"]).read_text().split()[-5]
    assert outcome["exit"] == 124
    end = time.monotonic() + 20
    while is_alive(child) and time.monotonic() < end:  # the kernel takes its time
        time.sleep(0.05)
    assert not is_alive(child)


def is_alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_steps_beside_each_other(run):
    steps = [python(f"step {i}", "import time; time.sleep(1)") for i in range(4)]
    start = time.monotonic()
    run.steps(steps, at_once=4)
    assert time.monotonic() - start < 4 and set(run.document["steps"]) == {f"step {i}" for i in range(4)}


def test_what_is_left_out_is_named(run):
    assert run.step(python("needy", "", needs=("json", "no_such_package"))) is None
    run.end = time.monotonic()
    assert run.step(python("late", "")) is None
    wanted = {"needy": "no_such_package not installed", "late": "no time left"}
    assert json.loads(run.path.read_text())["left_out"] == wanted


# ---- what is run ----


def test_the_plan_has_everything_and_the_most_wanted_first(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda program: f"/somewhere/{program}")
    names = [step.name for step in bench.plan(dry=False)]
    assert set(suite.families()) == set(FAMILIES)
    assert set(names) == {
        "whole run, resnet18",
        "whole run, vgg16_bn",
        "stalls, inverses",
        "stalls, covariance",
        *(f"{family}, {network}" for family in FAMILIES for network in NETWORKS),
        *(f"training, {network}" for network in TRAINED),
    }
    assert names[0] == "covariance, VGG19 b128" and names.index("training, resnet20") < names.index(
        "covariance, MLP b256"
    )


def test_no_step_may_take_the_time_of_all(tmp_path):
    steps = [*bench.plan(dry=False), *check.tests(False), *check.sanitized(tmp_path)]
    assert all(step.limit <= 75 for step in steps)
    assert check.MINUTES <= 5 and bench.MINUTES <= 6


def test_the_build_is_for_one_device_and_keeps_cores_free(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    environment = check.build("9.0").environment
    assert environment["KFAC_CUDA_ARCHITECTURES"] == "90-real"
    assert environment["CMAKE_BUILD_PARALLEL_LEVEL"] == "16"


def test_every_test_that_is_run_is_there():
    assert all((ROOT / name).is_file() for name in check.TESTS)
    with_devices = {
        f"tests/ops/{path.name}" for path in (ROOT / "tests/ops").glob("test_*.py") if "device" in path.read_text()
    }
    others = {f"tests/ops/test_{name}.py" for name in ("cuda_trust", "factors", "schedules")}  # none is there
    assert with_devices - set(check.TESTS) == others


def test_every_program_that_is_sanitized_is_built():
    sources = Path(ROOT / "tests/native/CMakeLists.txt").read_text()
    assert all(f"    {program}" in sources for program in check.PROGRAMS)


def test_without_a_device_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["gpu", "check"])
    monkeypatch.setattr(check, "machine", lambda name, *_: python(name, WRITES, writes=True))
    with pytest.raises(SystemExit, match="no CUDA device; `--dry` tries the script"):
        script.main()
    assert json.loads((tmp_path / "gpu-check.json").read_text())["finished"]


def test_a_build_that_fails_ends_the_run(run, monkeypatch):
    found = 'import sys, pathlib; pathlib.Path(sys.argv[-1]).write_text(\'{"device": "X", "capability": "9.0"}\')'
    monkeypatch.setattr(check, "machine", lambda name, *_: python(name, found, writes=True))
    monkeypatch.setattr(check, "build", lambda capability: python("build", "raise SystemExit(2)"))
    with pytest.raises(SystemExit, match="the build failed, see"):
        check.check(run, dry=False)


# ---- what is measured, small and on the CPU ----


REACHED = {"copy_gbs": 100.0, "matmul_gflops": 1000.0, "matmul_tf32_gflops": 4000.0}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_on_a_network(family):
    network = "ResNet50 b32" if family == "covariance" else "MLP b256"
    cases = suite.measured(family, network, CPU, quick=True)
    assert [case["name"] for case in cases] == [f"{network}, float32", f"{network}, tf32"]
    for case in cases:
        variants = case["variants"]
        assert all(found["median"] > 0 for found in variants.values())
        assert 0 < case["native_error"] < 1e-5
        plain = variants[list(variants)[1]]
        assert plain["speedup"] == plain["median"] / variants["native"]["median"]
        assert share(case, REACHED) > 0


def test_a_floor_is_what_takes_longest():
    assert Floor(4e9, 12e9, 0.0, 1e8).seconds(REACHED, "tf32") == pytest.approx(2e-3)
    assert Floor(4e9, 12e9, 0.0, 1e8).seconds(REACHED, "float32") == pytest.approx(6e-3)
    assert Floor(0.0, 0.0, 4e9, 1e8).seconds(REACHED, "tf32") == pytest.approx(8e-3)
    assert Floor(0.0, 0.0, 0.0, 1e8).seconds(REACHED, "tf32") == pytest.approx(1e-3)


def test_a_training_step_that_fails_leaves_the_others(tmp_path, monkeypatch):
    kinds = {"float32": {}, "bf16": {"amp": "no such"}, "bf16, channels_last": KINDS["bf16, channels_last"]}
    monkeypatch.setattr(training, "KINDS", kinds)
    with pytest.raises(SystemExit), couplings_are_kept():
        training.trained("mlp", CPU, True, tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert "amp" in found["failed"]["bf16"] and found["failed"].keys() == {"bf16"}
    assert [case["name"] for case in found["cases"]] == ["mlp, float32", "mlp, bf16, channels_last"]


def step_of_training(kind, bare, full):
    variants = {"bare": {"median": bare}, "flatprune": {"median": full}}
    return {"suite": "training step", "name": f"mlp, {kind}", "kind": "time", "unit": "s", "variants": variants}


def test_tables_of_a_run(run):
    for case in (*suite.measured("saliency", "MLP b256", CPU, quick=True), step_of_training("float32", 2e-3, 3e-3)):
        run.add(case)
    outcome = {"exit": 0, "seconds": 1.0, "log": "", "last": ""}
    failed = {
        "covariance, MLP b256": outcome | {"exit": 124, "last": "ended after 25 s"},
        "training, mlp": outcome | {"exit": 1},
    }
    run.keep("steps", {"saliency, MLP b256": outcome} | failed)
    run.keep("left_out", {"flatprune run": "no time left"})
    run.keep("machine", machine())
    run.keep("rates_before", REACHED)
    shown = results_table(load(run.path))
    assert "Left out: flatprune run (no time left)." in shown
    assert "Failed: covariance, MLP b256 (ended after 25 s), training, mlp ()." in shown
    assert "Saliency, milliseconds" in shown and "| MLP b256 |" in shown
    assert "| mlp | 2 | 3 | 1.50 | - | - | - | - | - | - |" in shown
    assert "| saliency of VGG19 b128, against batched | >= 2 |  | not measured |" in shown
    lines = [line for line in shown.splitlines() if line.startswith("| MLP") or ", tf32 | graph" in line]
    assert len(lines) == 2 and len({line.count("|") for line in lines}) == 1


def test_goals_name_what_is_measured():
    for goal in GPU_GOALS:
        family, rest = goal.name.split(" of ")
        network, variant = rest.split(", ")
        work = suite.families()[family](work_sets(True)[network], CPU)
        assert variant.removeprefix("against ") in work.variants()
