"""The CUDA power iteration without a GPU: its kernel with simulated threads, alone and under the public functions."""

import subprocess
from types import SimpleNamespace

import pytest
import torch

import kfac_ext
from kfac_ext import _C, FactorSet, reference
from kfac_ext.ops import _power_covariance_kernels as covariance_kernels
from kfac_ext.ops import _power_kernels as kernels
from kfac_ext.ops import power
from tests.conftest import relative_error, thorough


@pytest.mark.parametrize("case", thorough(["kinds", "sizes", "resnet32", "vgg19"], but=["kinds", "sizes"]))
def test_schedules_against_float64(build_target, case):
    program = build_target("power_iteration_emulation") / "power_iteration_emulation"
    run = subprocess.run([program, case], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("case", ["failing", "kinds", "networks", "sizes"])
def test_matrix_free_schedules_against_float64(build_target, case):
    program = build_target("power_iteration_covariance_emulation") / "power_iteration_covariance_emulation"
    run = subprocess.run([program, case], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture
def launches(emulation, monkeypatch):
    """CPU tensors go the way of CUDA tensors; a list of the number of matrices in each launch."""
    counts = []

    def launch(group, descriptors, workspace, matrices, *rest):
        counts.append(len(matrices))
        emulation.power_iteration_cuda(group, descriptors, workspace, matrices, *rest)

    compiled = {name: getattr(_C, name) for name in ("PowerGroup", "max_power_matrices", "power_fits")}
    compiled["power_iteration_device"] = emulation.power_iteration_device
    monkeypatch.setattr(kernels, "_C", SimpleNamespace(**compiled, power_iteration_cuda=launch))
    monkeypatch.setattr(power, "_run", kernels.run_cuda)
    kernels._group.cache_clear()
    kernels._device.cache_clear()
    yield counts
    kernels._group.cache_clear()
    kernels._device.cache_clear()


def factors_of(sizes):
    torch.manual_seed(0)
    rows = [torch.randn(4 * n, n) + 0.3 for n in sizes]
    return [x.mT @ x / len(x) for x in rows]


@pytest.mark.parametrize("tol", [1e-2, 1e-5])
def test_all_matrices_in_one_launch(launches, tol):
    matrices = factors_of([1, 10, 16, 27, 64, 145, 300])
    found = kfac_ext.power_iteration(matrices, tol=tol, max_iter=500)
    exact = reference.power_iteration([m.double() for m in matrices], tol=tol, max_iter=500)
    assert launches == [len(matrices)]
    assert relative_error(found.eigenvalues, exact.eigenvalues) < 1e-6
    assert (found.iterations - exact.iterations).abs().max() <= 1
    assert (found.residuals <= tol).all()
    for vector, matrix in zip(found.eigenvectors, matrices):
        assert (vector.norm() - 1).abs() < 1e-6
        assert relative_error(matrix @ vector, vector * vector.dot(matrix @ vector)) < 2 * tol


def test_factors_start_where_they_stand(launches):
    matrices = factors_of([20, 130])
    factors = FactorSet({"fc.A": 20, "fc.G": 130})
    for key, matrix in zip(factors, matrices):
        factors[key].copy_(matrix)
    cold = factors.power_iteration_(max_iter=500)
    warm = factors.power_iteration_(max_iter=500)
    assert (warm.iterations == 1).all() and (cold.iterations > 1).all()
    assert launches == [2, 2]


def test_strides(launches):
    (matrix,) = factors_of([60])
    wide = torch.full((60, 70), torch.nan)
    wide[:, :60] = matrix
    found = kfac_ext.power_iteration([wide[:, :60], matrix.mT, matrix[::2, ::2]], tol=1e-4)
    exact = reference.power_iteration([matrix, matrix, matrix[::2, ::2]], tol=1e-4)
    assert relative_error(found.eigenvalues, exact.eigenvalues) < 1e-6


def test_more_matrices_than_parameters(launches):
    matrices = [torch.eye(3) * (i + 1) for i in range(500)]
    found = kfac_ext.power_iteration(matrices)
    assert launches == [224, 224, 52]
    assert torch.allclose(found.eigenvalues, torch.arange(1.0, 501.0))


def test_twice_the_same_bits(launches):
    matrices = factors_of([200, 33])
    first, second = (kfac_ext.power_iteration(matrices, tol=1e-4) for _ in range(2))
    assert torch.equal(first.eigenvalues, second.eigenvalues)
    assert all(torch.equal(a, b) for a, b in zip(first.eigenvectors, second.eigenvectors))


def test_kernels_without_a_gpu_pass_their_own_check(launches):
    assert kernels._check(torch.device("cpu")) < 0.3
    assert launches == [2]


def test_what_does_not_fit_into_shared_memory_is_refused():
    with pytest.raises(ValueError, match="a matrix of size 300, whose vectors do not fit into 2048 bytes"):
        _C.PowerGroup([(300, 300)], 4, 2048)
    assert not _C.power_fits(300, 2048) and _C.power_fits(4608, 48 << 10)


# ---- covariances ----


@pytest.fixture
def matrix_free(emulation, monkeypatch):
    """CPU tensors go the way of CUDA tensors; a list of the number of blocks in each launch."""
    blocks = []

    def launch(group, *rest):
        blocks.append(group.blocks)
        emulation.covariance_power_iteration_cuda(group, *rest)

    namespace = {"CovariancePowerGroup": _C.CovariancePowerGroup, "covariance_power_iteration_cuda": launch}
    namespace["covariance_power_blocks"] = emulation.covariance_power_blocks
    monkeypatch.setattr(covariance_kernels, "_C", SimpleNamespace(**namespace))
    monkeypatch.setattr(power, "_run_covariance", covariance_kernels.run_covariance_cuda)
    covariance_kernels._blocks.cache_clear()
    covariance_kernels._group.cache_clear()
    yield blocks
    covariance_kernels._blocks.cache_clear()
    covariance_kernels._group.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_in_one_launch(matrix_free, dtype, layout, bias):
    x = torch.randn(6, 20, 17, 16).add(0.3).to(dtype).contiguous(memory_format=layout)
    found = kfac_ext.covariance_power_iteration(x, 3, padding=1, bias=bias, tol=1e-4)
    exact = reference.covariance_power_iteration(x.double(), 3, padding=1, bias=bias, tol=1e-4)
    assert matrix_free == [5]
    assert relative_error(found.eigenvalues, exact.eigenvalues) < 1e-6
    assert relative_error(found.eigenvectors[0], exact.eigenvectors[0]) < 1e-5
    assert (found.iterations - exact.iterations).abs().max() <= 1


@pytest.mark.parametrize("view", ["transposed", "strided", "expanded", "misaligned", "sequence"])
def test_rows_of_any_strides(matrix_free, view):
    base = torch.randn(40, 42)
    x = {
        "transposed": base.T,
        "strided": base[::2, ::3],
        "expanded": base[:1].expand(7, 42),
        "misaligned": base.flatten()[1:1601].view(40, 40),
        "sequence": base[:, 2:].view(10, 4, 40),
    }[view]
    found = kfac_ext.covariance_power_iteration(x, bias=True, tol=1e-4, max_iter=500)
    exact = reference.covariance_power_iteration(x.double(), bias=True, tol=1e-4, max_iter=500)
    assert relative_error(found.eigenvalues, exact.eigenvalues) < 1e-6


def test_a_warm_start_and_what_is_not_finite(matrix_free):
    x = torch.randn(100, 30) + 0.3
    cold = kfac_ext.covariance_power_iteration(x)
    warm = kfac_ext.covariance_power_iteration(x, None, cold.eigenvectors[0])
    assert int(warm.iterations) == 1 < int(cold.iterations)
    x[3, 4] = torch.inf
    bad = kfac_ext.covariance_power_iteration(x)
    assert bad.eigenvalues.isnan().all() and bad.residuals.isnan().all() and int(bad.iterations) == 1


def test_vectors_beyond_shared_memory_are_left_to_the_reference(matrix_free, monkeypatch):
    monkeypatch.setattr(covariance_kernels._C, "covariance_power_blocks", lambda n, device: 0)
    x = torch.randn(50, 20)
    found, exact = kfac_ext.covariance_power_iteration(x), reference.covariance_power_iteration(x)
    assert matrix_free == [] and torch.equal(found.eigenvalues, exact.eigenvalues)


def test_the_matrix_free_kernel_passes_its_own_check(matrix_free):
    assert covariance_kernels._check(torch.device("cpu")) < 0.3
    assert len(matrix_free) == 5
