"""`make gpu` where there is no GPU: the script on the CPU, its tables, the report of ptxas."""

import json

import pytest
import torch

from bench import cuda_report, gpu, gpu_covariance, worksets
from kfac_ext import _C, reference


def test_a_dry_run_writes_all_of_the_document(tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"
    monkeypatch.setattr("sys.argv", ["gpu", "--dry", "--out", str(path)])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 0
    document = json.loads(path.read_text())
    assert document["left_out"] == [] and document["machine"]["commit"]
    for entry in document["results"]["covariance"].values():
        for name in ("float32", "tf32"):
            assert all(times["median"] > 0 for times in entry[name]["ms"].values())
            assert 0 < entry[name]["native_error"] < 1e-6
        assert set(entry["ratios"]) == {
            f"{baseline} {name} / native {name}"
            for baseline in ("strided unfold", "conv2d_weight")
            for name in ("float32", "tf32")
        }
    table = gpu.results_table(document)
    assert all(name in table for name in ("VGG19 b128", "ResNet32 b128", "ResNet50 b32", "MLP b256"))


def test_without_a_device_it_says_so(monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device; `--dry` tries the script"):
        gpu.main()


@pytest.mark.parametrize("kernel", [3, 5])
def test_the_weight_gradient_gives_all_blocks(kernel):
    x = torch.randn(3, 5, 7, 7, dtype=torch.float64)
    value = gpu_covariance.weight_gradient_covariance(x, worksets.conv("", 3, 5, 5, 7, kernel))
    torch.testing.assert_close(value, reference.conv2d_covariance(x, kernel, padding=kernel // 2))


REPORT = """
ptxas info    : Compiling entry function '_ZN4kfac23covariance_tiles_kernelILNS_7MmaModeE2EEEvPf' for 'sm_90'
ptxas info    : Function properties for _ZN4kfac23covariance_tiles_kernelILNS_7MmaModeE2EEEvPf
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 208 registers, used 1 barriers, 384 bytes cmem[0]
"""


def test_a_report_of_ptxas_is_read():
    (kernel,) = cuda_report.kernels(REPORT)
    assert kernel == ("covariance_tiles_kernel<2>", "sm_90", 208, 8, 12)
    assert cuda_report.resident_blocks(kernel, 256, 73728) == 1


@pytest.mark.skipif(not _C.cuda_architectures(), reason="no CUDA kernels in this build")
def test_every_compiled_kernel_is_reported_and_its_loops_spill_little():
    kernels = [line.split("|") for line in cuda_report.table().splitlines() if "_kernel" in line]
    assert {row[1].strip(" `") for row in kernels} == {name for name, *_ in _C.cuda_kernels()}
    assert all(int(row[4].split(",")[0]) <= 64 for row in kernels)
