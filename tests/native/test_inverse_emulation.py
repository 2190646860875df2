"""The CUDA damped inverses without a GPU: kernels run by simulated threads, alone and under the public functions."""

import subprocess
from types import SimpleNamespace

import pytest
import torch

import kfac_ext
from kfac_ext import _C, reference
from kfac_ext.ops import _inverse_kernels as kernels
from kfac_ext.ops import inverse
from tests.conftest import relative_error, thorough

QUICK = ["small", "failing", "failing_large", "pi"]


@pytest.mark.parametrize("case", thorough([*QUICK, "large"], but=QUICK))
def test_schedules_against_float64(build_target, case):
    program = build_target("inverse_emulation") / "inverse_emulation"
    run = subprocess.run([program, case], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture
def launches(emulation, monkeypatch):
    """CPU tensors go the way of CUDA tensors; a list of the number of matrices in each launch."""
    counts = []

    def launch(group, descriptors, workspace, pointers, *rest):
        counts.append(len(pointers))
        emulation.damped_inverse_cuda(group, descriptors, workspace, pointers, *rest)

    compiled = {name: getattr(_C, name) for name in ("InverseGroup", "max_inverse_matrices", "max_pi_pairs")}
    compiled["pi_damping_cuda"] = emulation.pi_damping_cuda
    monkeypatch.setattr(kernels, "_C", SimpleNamespace(**compiled, damped_inverse_cuda=launch))
    monkeypatch.setattr(inverse, "_run", kernels.run_cuda)
    return counts


def factors_of(sizes):
    torch.manual_seed(0)
    rows = [torch.randn(2 * n, n) + 0.3 for n in sizes]
    return [x.mT @ x / len(x) for x in rows]


SIZES = [1, 10, 16, 27, 64, 100, 128, 129, 300]


def assert_inverse(found, matrices, amounts):
    for value, matrix, amount in zip(found, matrices, amounts):
        wanted = torch.linalg.inv(matrix.double() + torch.diag(torch.as_tensor(amount).double().expand(len(matrix))))
        assert relative_error(value, wanted) < 2e-5
        assert torch.equal(value, value.mT)


def test_all_matrices_in_one_launch(launches):
    matrices = factors_of(SIZES)
    assert_inverse(kfac_ext.damped_inverse(matrices, 0.1), matrices, [0.1] * len(matrices))
    assert launches == [len(matrices)]


def test_only_the_lower_triangle_is_read_and_rows_may_be_apart(launches):
    matrices = factors_of([60, 120, 150])
    given = []
    for matrix in matrices:
        wide = torch.full((len(matrix), len(matrix) + 5), torch.nan)
        wide[:, : len(matrix)] = matrix.tril() + torch.full_like(matrix, torch.nan).triu(1)
        given.append(wide[:, : len(matrix)])
    assert_inverse(kfac_ext.damped_inverse(given, 0.1), matrices, [0.1] * 3)


def test_diagonals_and_tensors(launches):
    matrices = factors_of([30, 20, 70, 140])
    diagonals = [torch.rand(n, dtype=torch.float64) + 0.1 for n in (70, 140)]
    damping = [0.1, torch.tensor(0.2), *diagonals]
    assert_inverse(kfac_ext.damped_inverse(matrices, damping), matrices, damping)


def test_pi(launches):
    matrices = factors_of([30, 20, 70, 9])
    pairs = [(0, 3), (2, 1)]
    amounts = reference.inverse.pi_damping([m.double() for m in matrices], 0.01, pairs)
    assert torch.allclose(kernels.pi_amounts_cuda(matrices, 0.01, pairs), torch.stack(amounts), rtol=1e-12)
    assert_inverse(kfac_ext.damped_inverse(matrices, 0.01, pi=pairs), matrices, amounts)


@pytest.mark.parametrize("n", [3, 60, 128, 150])
def test_what_fails_is_named_and_nan(launches, n):
    matrices = factors_of([n, n, n])
    matrices[1][n // 2, n // 2] = -1
    found, info = kfac_ext.damped_inverse_ex(matrices, 0.01)
    assert info.tolist() == [0, n // 2 + 1, 0]
    assert found[1].isnan().all() and found[0].isfinite().all() and found[2].isfinite().all()
    with pytest.raises(torch.linalg.LinAlgError, match=r"matrices \[1\] are not positive definite"):
        kfac_ext.damped_inverse(matrices, 0.01)


def test_what_float32_cannot_do_is_done_in_float64(launches):
    rows = torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = (rows.mT @ rows).float()
    smallest = float(torch.linalg.eigvalsh(matrix.double())[0])
    damping = 1e-8 - smallest  # the condition is 1e9 or more
    found, info = kernels.run_cuda([matrix], torch.tensor([damping], dtype=torch.float64), [])
    assert info.item() > 0 and found[0].isnan().all()
    wanted = torch.linalg.inv(matrix.double() + damping * torch.eye(40, dtype=torch.float64))
    assert relative_error(kfac_ext.damped_inverse([matrix], damping)[0], wanted) < 1e-4


@pytest.mark.parametrize("damping", [1e-1, 1e-3])
def test_error_is_that_of_float32(launches, damping):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 400, dtype=torch.float64, generator=generator) + 0.3
    matrix = (rows.mT @ rows / 60).float()
    wanted = torch.linalg.inv(matrix.double() + damping * torch.eye(400, dtype=torch.float64))
    plain = torch.cholesky_inverse(torch.linalg.cholesky(matrix + damping * torch.eye(400)))
    assert relative_error(kfac_ext.damped_inverse([matrix], damping)[0], wanted) < 3 * relative_error(plain, wanted)


def ill_conditioned(kind, n):
    """A covariance of fewer rows than columns, or of neighbours that are nearly the same."""
    generator = torch.Generator().manual_seed(0)
    if kind == "smooth":
        place = torch.arange(n, dtype=torch.float64)
        return torch.exp(-(((place[:, None] - place) / 6) ** 2)).float()
    rows = torch.randn(kind, n, dtype=torch.float64, generator=generator) + 0.3
    return (rows.mT @ rows / kind).float()


@pytest.mark.parametrize("kind, relative", [(20, 3e-7), (100, 3e-7), (100, 1e-7), ("smooth", 3e-7)])
def test_error_is_that_of_float32_with_little_damping(launches, kind, relative):
    """Damping is relative to the largest eigenvalue; pivots of one tile differ by up to 10^6."""
    matrix = ill_conditioned(kind, 400)
    damping = relative * float(torch.linalg.eigvalsh(matrix.double())[-1])
    wanted = torch.linalg.inv(matrix.double() + damping * torch.eye(400, dtype=torch.float64))
    plain = torch.cholesky_inverse(torch.linalg.cholesky(matrix + damping * torch.eye(400)))
    (found,), info = kernels.run_cuda([matrix], torch.tensor([damping], dtype=torch.float64), [])
    assert info.item() == 0 and relative_error(found, wanted) < 3 * relative_error(plain, wanted)


def test_more_matrices_than_parameters(launches):
    found = kfac_ext.damped_inverse([torch.eye(2) * (i + 1) for i in range(400)], 1.0)
    assert launches == [160, 160, 80]
    assert torch.allclose(torch.stack([m[0, 0] for m in found]), 1 / torch.arange(2.0, 402.0))


def test_kernels_without_a_gpu_pass_their_own_check(launches):
    assert kernels._check(torch.device("cpu")) < 0.3
