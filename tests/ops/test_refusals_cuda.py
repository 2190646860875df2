"""Bad and odd input of CUDA tensors: what the operations refuse or take on the CPU, they refuse or take there."""

import math

import pytest
import torch

import kfac_ext
from kfac_ext import CovarianceUpdate, FactorSet
from tests.conftest import relative_error
from tests.ops.factor_lists import spd

READY = torch.cuda.is_available() and bool(kfac_ext.build_info()["cuda_architectures"])
pytestmark = pytest.mark.skipif(
    not READY, reason="no CUDA device" if not torch.cuda.is_available() else "no CUDA kernels in this build"
)


def twice(operation):
    """What an operation does on the CPU and on the GPU: tensors, or the error in words."""
    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        try:
            found.append([t.cpu() for t in operation(device)])
        except (TypeError, ValueError, IndexError, torch.linalg.LinAlgError) as error:
            found.append(f"{type(error).__name__}: {error}".replace("cuda:0", "cuda").replace("cuda", "cpu"))
    return found


REFUSED = {
    "a matrix that is not square": lambda d: kfac_ext.damped_inverse([torch.ones(2, 3, device=d)], 0.1),
    "a matrix of no rows": lambda d: kfac_ext.power_iteration([torch.ones(0, 0, device=d)]).eigenvectors,
    "two dtypes": lambda d: kfac_ext.damped_inverse([torch.eye(2, device=d), torch.eye(2, device=d).double()], 0.1),
    "integers": lambda d: [kfac_ext.linear_covariance(torch.ones(3, 4, dtype=torch.int64, device=d))],
    "no samples": lambda d: [kfac_ext.conv2d_covariance(torch.ones(0, 3, 8, 8, device=d), 3)],
    "a kernel larger than the image": lambda d: [kfac_ext.conv2d_covariance(torch.ones(1, 3, 2, 2, device=d), 3)],
    "an out of another shape": lambda d: [
        kfac_ext.linear_covariance_(torch.ones(3, 3, device=d), torch.ones(3, 4, device=d))
    ],
    "a negative damping": lambda d: kfac_ext.damped_inverse([torch.eye(2, device=d)], -0.1),
    "no inverse": lambda d: kfac_ext.damped_inverse([-torch.eye(2, device=d)], 0.1),
    "an index out of range": lambda d: kfac_ext.compensate(
        [torch.ones(2, 4, device=d)], [torch.eye(4, device=d)], [torch.tensor([4], device=d)]
    ),
    "an empty list of columns": lambda d: kfac_ext.GreedySelection([], [], [], []).scores,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_cpu_refuses(name):
    on_cpu, on_gpu = twice(REFUSED[name])
    assert isinstance(on_cpu, str) and on_gpu == on_cpu


@pytest.mark.parametrize("operation", ["inverse", "power", "saliency", "covariance"])
def test_mixed_devices_are_named(operation):
    near, far = torch.eye(4, device="cuda"), torch.eye(4)
    calls = {
        "inverse": lambda: kfac_ext.damped_inverse([near, far], 0.1),
        "power": lambda: kfac_ext.power_iteration([near, far]),
        "saliency": lambda: kfac_ext.obd_saliency([near], [far], [near], [1]),
        "covariance": lambda: kfac_ext.linear_covariance_(far, near),
    }
    with pytest.raises(ValueError, match="is on c"):
        calls[operation]()


def test_empty_lists():
    assert kfac_ext.damped_inverse([], 0.1) == [] and kfac_ext.obd_saliency([], [], [], []) == []
    assert len(kfac_ext.power_iteration([]).eigenvalues) == 0
    FactorSet({"A": 3}, device="cuda").accumulate_([])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n", [1, 3, 128, 129, 300])
def test_numbers_that_are_none(bad, n):
    """One matrix of three; the others are as they were."""
    matrices = [spd(n, device="cuda") for _ in range(3)]
    matrices[1][n // 2, n // 2] = bad
    inverses, info = kfac_ext.damped_inverse_ex(matrices, 0.1)
    assert info.tolist() == [0, n // 2 + 1, 0] and bool(inverses[1].isnan().all())
    assert bool(inverses[0].isfinite().all()) and torch.equal(inverses[0], inverses[2])
    pairs = kfac_ext.power_iteration(matrices, max_iter=5)
    assert pairs.eigenvalues.isfinite().tolist() == [True, False, True]
    x = torch.ones(4, n, device="cuda")
    x[2, n // 2] = bad
    A = kfac_ext.linear_covariance(x)
    row = torch.arange(n, device="cuda") == n // 2
    assert not bool(A[row].isfinite().any()) and bool(A[~row][:, ~row].isfinite().all())


@pytest.mark.parametrize("offset", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_that_begin_anywhere(offset, dtype):
    memory = torch.randn(4 * 6 * 9 * 9 + 8, device="cuda").to(dtype)
    x = memory[offset : offset + 4 * 6 * 81].view(4, 6, 9, 9)
    found, wanted = (kfac_ext.conv2d_covariance(v, 3, padding=1, bias=True) for v in (x, x.clone()))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("n", [5, 130])
def test_matrices_that_begin_anywhere_and_lie_anyhow(n):
    matrix = spd(n, device="cuda")
    wide = torch.full((n, n + 7), math.nan, device="cuda")
    wide[:, 3 : n + 3] = matrix
    inside = torch.zeros(n * n + 1, device="cuda")
    inside[1:] = matrix.flatten()
    for given in (wide[:, 3 : n + 3], inside[1:].view(n, n), matrix.mT):
        assert torch.equal(kfac_ext.damped_inverse([given], 0.1)[0], kfac_ext.damped_inverse([matrix], 0.1)[0])
        found, wanted = (kfac_ext.power_iteration([m], max_iter=9).eigenvalues for m in (given, matrix))
        assert torch.equal(found, wanted)


def test_strides_of_every_kind():
    x = torch.randn(3, 5, 8, 10, device="cuda")
    views = {
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "every second": x.repeat_interleave(2, dim=3)[..., ::2],
        "broadcast": x[:1].expand(3, -1, -1, -1),
    }
    for name, view in views.items():
        exact = kfac_ext.reference.conv2d_covariance(view.double(), 3, padding=1)
        assert relative_error(kfac_ext.conv2d_covariance(view, 3, padding=1), exact) < 1e-6, name


@pytest.mark.parametrize("size", [1, 2])
def test_the_smallest(size):
    x = torch.randn(1, size, 1, 1, device="cuda")
    assert relative_error(kfac_ext.conv2d_covariance(x, 1), x.flatten().outer(x.flatten())) < 1e-6
    factors = FactorSet({"A": size}, device="cuda")
    factors.accumulate_([CovarianceUpdate.linear("A", x.view(1, size))])
    assert relative_error(factors["A"], x.flatten().outer(x.flatten())) < 1e-6
    one = torch.full((size, size), 3.0, device="cuda")
    assert abs(float(kfac_ext.power_iteration([one]).eigenvalues) - 3 * size) < 1e-5
    V, eye = torch.ones(size, size, device="cuda"), torch.eye(size, device="cuda")
    (scores,) = kfac_ext.obd_saliency([V], [eye], [eye], [1])
    assert scores.tolist() == [size / 2] * size
