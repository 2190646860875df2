"""`make gpu` where there is no GPU: the script on the CPU, its tables, the report of ptxas."""

import json
from pathlib import Path

import pytest
import torch

from bench import worksets
from bench.gpu import __main__ as script
from bench.gpu import checks, compiled, counts, linear_algebra, suite, training
from bench.gpu import run as runs
from bench.gpu.networks import work_sets
from bench.gpu.table import GOALS, results_table
from kfac_ext import _C
from tests.found_couplings import couplings_are_kept


def test_a_dry_run_writes_all_of_the_document(tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"
    monkeypatch.setattr("sys.argv", ["gpu", "--dry", "--out", str(path)])
    with pytest.raises(SystemExit) as end, couplings_are_kept():
        script.main()
    assert end.value.code == 0
    document = json.loads(path.read_text())
    assert document["left_out"] == [] and document["machine"]["commit"]
    assert set(document["results"]) == set(suite.families())
    for family, networks in document["results"].items():
        assert set(networks) == set(work_sets(True)), family
        for entry in networks.values():
            for name in ("float32", "tf32"):
                times = entry[name]["ms"]
                assert "native" in times and all(t["median"] > 0 for t in times.values())
                assert 0 < entry[name]["native_error"] < 1e-5
                assert all(fraction > 0 for fraction in entry["fractions"][name].values())
                ratio = entry["ratios"][f"{list(times)[1]} {name} / native {name}"]
                assert ratio == list(times.values())[1]["median"] / times["native"]["median"]
    assert set(document["training"]) == set(training.NETWORKS)
    for kinds in document["training"].values():
        assert set(kinds) == set(training.KINDS)
        for entry in kinds.values():
            assert entry["ratio"] == entry["ms"]["flatprune"]["median"] / entry["ms"]["bare"]["median"] > 0
    table = results_table(document)
    assert all(f"| {name} |" in table for name in training.NETWORKS)
    assert all(family.capitalize() in table for family in suite.families())
    assert all(name in table for name in ("VGG19 b128", "ResNet32 b128", "ResNet50 b32", "MLP b256"))


def test_goals_name_what_is_measured():
    work = {name: family(work_sets(True)["MLP b256"], torch.device("cpu")) for name, family in suite.families().items()}
    for family, (baseline, networks) in GOALS.items():
        assert baseline in work[family].variants() and set(networks) < set(work_sets(True))


def test_what_fails_is_said_and_the_rest_is_kept(tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(linear_algebra.Inverses, "variants", fail)
    monkeypatch.setattr(training, "NETWORKS", {})
    monkeypatch.setattr(suite, "work_sets", lambda quick: {"MLP b256": [worksets.LayerShape("fc", 4, 5, 6)]})
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["gpu", "--dry"])
    with pytest.raises(SystemExit) as end:
        script.main()
    document = json.loads((tmp_path / "gpu-dry.json").read_text())
    assert end.value.code == 1 and document["failed"] == ["inverses, MLP b256: out of memory"]
    assert set(document["results"]) == set(suite.families()) - {"inverses"}


def test_a_command_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    run = runs.Run(tmp_path / "run.json", 1)
    monkeypatch.setattr(runs.Run, "seconds_left", lambda self: 0.0)
    monkeypatch.setattr(runs, "SHORTEST", 0.2)
    outcome = run.command("sleep", "bash", "-c", "echo begun; sleep 60 & wait")
    assert outcome["exit"] == 124 and outcome["seconds"] < 20 and outcome["output"] == "begun\n"


def test_every_test_that_is_run_is_there():
    assert all((runs.ROOT / name).is_file() for name in checks.TESTS)


def test_every_program_that_is_sanitized_is_built():
    sources = Path(runs.ROOT / "csrc/CMakeLists.txt").read_text()
    assert all(f"    {program}" in sources for program in checks.SANITIZED)


def test_without_a_device_it_says_so(monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device; `--dry` tries the script"):
        script.main()


REPORT = """
ptxas info    : Compiling entry function '_ZN4kfac23covariance_tiles_kernelILNS_7MmaModeE2EEEvPf' for 'sm_90'
ptxas info    : Function properties for _ZN4kfac23covariance_tiles_kernelILNS_7MmaModeE2EEEvPf
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 208 registers, used 1 barriers, 384 bytes cmem[0]
"""


def test_a_report_of_ptxas_is_read():
    (kernel,) = compiled.kernels(REPORT)
    assert kernel == ("covariance_tiles_kernel<2>", "sm_90", 208, 8, 12)
    assert compiled.resident_blocks(kernel, 256, 73728) == 1


@pytest.mark.skipif(not _C.cuda_architectures(), reason="no CUDA kernels in this build")
def test_every_compiled_kernel_is_reported_and_spills_little():
    kernels = [line.split("|") for line in compiled.table().splitlines() if "_kernel" in line]
    assert {row[1].strip(" `") for row in kernels} == {name for name, *_ in _C.cuda_kernels()}
    assert all(int(row[4].split(",")[0]) <= 64 for row in kernels)


def test_counts_of_schedules():
    inverse = _C.InverseGroup([(256, 256), (128, 128), (20, 20)]).counts()
    assert inverse == {"products": 6 * 128.0**3, "launches": 9, "pivots": 384}  # a level: panel, panel, update
    assert _C.SaliencyGroup([(64, 130, 1, 130, 130, 64)]).counts() == {"products": 3 * 64.0**3, "tiles": 3}
    power = _C.PowerGroup([(300, 300), (40, 40)], 4, 64 << 10).counts()
    assert power["entries"] == 300**2 + 40**2 and power["kept"] < power["entries"] and power["most"] >= 300 * 75
    for table in (counts.covariance_table(), counts.algebra_table()):
        widths = {line.count("|") for line in table.splitlines()}
        assert len(widths) == 1 and all(f"| {name} |" in table for name in work_sets(False))
