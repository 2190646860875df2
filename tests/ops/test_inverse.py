import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kfac_ext
from kfac_ext import reference
from tests.conftest import relative_error
from tests.ops.factor_lists import SIZES, allowed, spd

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [*SIZES, 256, 257, 272, 600])
def test_inverse(device, threads, dtype, n):
    matrix = spd(n, dtype, device=device)
    damped = matrix.double() + 0.01 * torch.eye(n, device=device, dtype=torch.float64)
    exact = torch.linalg.inv(damped)
    rounding = 0.5 * torch.finfo(dtype).eps * float(torch.linalg.cond(damped))
    (inverse,) = kfac_ext.damped_inverse([matrix], 0.01)
    (plain,) = reference.damped_inverse([matrix], 0.01)
    assert inverse.dtype == dtype and inverse.is_contiguous()
    assert relative_error(inverse, exact) <= allowed(dtype, plain, exact, floor=max(rounding, 1e-6))
    assert torch.equal(inverse, inverse.T)


def test_a_large_list(device, threads):
    matrices = [spd(n, device=device) for n in (1024, 5, 300, 16, 700, 64)]
    for matrix, inverse in zip(matrices, kfac_ext.damped_inverse(matrices, 0.01)):
        damped = matrix.double() + 0.01 * torch.eye(len(matrix), device=device, dtype=torch.float64)
        assert relative_error(inverse, torch.linalg.inv(damped)) < 2e-5


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("n", [40, 400])
def test_ill_conditioned_matrices_lose_no_more_than_in_torch(device, condition, n):
    matrices = [spd(n, condition=condition, seed=seed, device=device) for seed in range(8)]
    exact = [torch.linalg.inv(matrix.double()) for matrix in matrices]
    native, plain = (module.damped_inverse(matrices, 0.0) for module in (kfac_ext, reference))
    errors = [sum(map(relative_error, found, exact)) for found in (native, plain)]
    assert errors[0] <= (2 if condition < 1e6 else 3) * errors[1]


def test_only_the_lower_triangle_is_read(device):
    for n in (3, 20, 300):
        matrix = spd(n, torch.float64, device=device)
        lower = matrix.clone()
        lower[torch.triu_indices(n, n, 1).unbind()] = math.nan
        assert torch.equal(*(kfac_ext.damped_inverse([m], 0.1)[0] for m in (matrix, lower)))


@pytest.mark.parametrize("native", [True, False])
def test_the_forms_of_damping(device, native):
    matrices = [spd(n, torch.float64, device=device) for n in (4, 30, 7)]
    diagonal = torch.rand(30, device=device, dtype=torch.float64)
    eye = [torch.eye(len(m), device=device, dtype=torch.float64) for m in matrices]
    expected = [0.2 * eye[0], diagonal.diag(), 0.25 * eye[2]]
    with kfac_ext.use_native(native):
        mixed = kfac_ext.damped_inverse(matrices, [0.2, diagonal, torch.tensor(0.25, device=device)])
        one = kfac_ext.damped_inverse(matrices, 0.5)
        tensor = kfac_ext.damped_inverse(matrices, torch.tensor(0.5, device=device))
        stacked = kfac_ext.damped_inverse(matrices, torch.tensor([0.5, 0.5, 0.5], device=device))
        single = kfac_ext.damped_inverse(matrices[1:2], [diagonal.float()])
    for i, matrix in enumerate(matrices):
        assert relative_error(mixed[i], torch.linalg.inv(matrix + expected[i])) < 1e-11
        for found in (one, tensor, stacked):
            assert relative_error(found[i], torch.linalg.inv(matrix + 0.5 * eye[i])) < 1e-11
    assert relative_error(single[0], torch.linalg.inv(matrices[1] + diagonal.float().double().diag())) < 1e-11


@pytest.mark.parametrize("native", [True, False])
def test_pi_corrected_damping(device, native):
    A, G, other = (spd(n, torch.float64, seed=n, device=device) for n in (5, 9, 3))
    G = 4 * G
    pi = float((A.diagonal().mean() / G.diagonal().mean()).sqrt())
    amounts = [0.1 * pi, 0.1 / pi, 0.01]
    with kfac_ext.use_native(native):
        found = kfac_ext.damped_inverse([A, G, other], 0.01, pi=[(0, 1)])
    for matrix, amount, inverse in zip([A, G, other], amounts, found):
        eye = torch.eye(len(matrix), device=device, dtype=torch.float64)
        assert relative_error(inverse, torch.linalg.inv(matrix + amount * eye)) < 1e-11
    plain = reference.damped_inverse([A, G, other], 0.01, pi=[(0, 1)])
    assert all(relative_error(a, b) < 1e-11 for a, b in zip(found, plain))


def test_pi_of_a_zero_factor_is_one(device):
    zero, G = torch.zeros(3, 3, device=device), spd(4, device=device)
    inverses, info = kfac_ext.damped_inverse_ex([zero, G], 0.04, pi=[(0, 1)])
    assert not info.any()
    assert torch.allclose(inverses[0], 5 * torch.eye(3, device=device))


# ---- matrices that have no inverse ----


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("n, k", [(1, 1), (5, 3), (20, 17), (300, 1), (300, 290), (300, 300)])
def test_info_names_the_leading_minor(device, native, n, k):
    matrix = torch.eye(n, device=device)
    matrix[k - 1, k - 1] = -1
    with kfac_ext.use_native(native):
        inverses, info = kfac_ext.damped_inverse_ex([spd(4, device=device), matrix, spd(n, device=device)], 0.01)
    assert info.dtype == torch.int32 and info.tolist() == [0, k, 0]
    assert bool(inverses[1].isnan().all())
    assert bool(inverses[0].isfinite().all()) and bool(inverses[2].isfinite().all())
    with pytest.raises(torch.linalg.LinAlgError, match=r"^damped_inverse: matrices \[1\] are not positive definite"):
        kfac_ext.damped_inverse([spd(4, device=device), matrix], 0.0)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n, at", [(1, (0, 0)), (40, (0, 0)), (40, (30, 2)), (300, (299, 299)), (300, (299, 7))])
def test_matrices_that_are_not_finite(device, threads, native, dtype, bad, n, at):
    matrix = torch.eye(n, device=device, dtype=dtype)
    matrix[at] = bad
    with kfac_ext.use_native(native):
        inverses, info = kfac_ext.damped_inverse_ex([matrix], 0.1)
        with pytest.raises(torch.linalg.LinAlgError):
            kfac_ext.damped_inverse([matrix], 0.1)
    assert bool(inverses[0].isnan().all())
    assert int(info) == at[0] + 1 if at[0] == at[1] else int(info) > 0


def test_what_fails_in_float32_is_tried_in_float64(device):
    # 1 + 1e-9 is 1 in float32, so the second pivot is 0 there; as a float32 input, damping must make the difference
    matrix = torch.ones(2, 2, device=device)
    damping = torch.full((2,), 2e-9, device=device, dtype=torch.float64)
    exact = torch.linalg.inv(matrix.double() + damping.diag())
    assert relative_error(kfac_ext.damped_inverse([matrix], [damping])[0], exact) < 1e-6
    inverses, info = kfac_ext.damped_inverse_ex([matrix], [damping])
    if device == "cpu":  # elsewhere that would be to wait
        assert info.tolist() == [0] and relative_error(inverses[0], exact) < 1e-6
    else:
        assert info.tolist() == [2] and bool(inverses[0].isnan().all())


def test_an_empty_list():
    inverses, info = kfac_ext.damped_inverse_ex([], 0.1)
    assert inverses == [] and info.dtype == torch.int32 and info.shape == (0,)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=5), st.integers(0, 9), st.floats(1e-3, 10))
def test_random_lists(sizes, seed, damping):
    matrices = [spd(n, torch.float64, seed=seed) for n in sizes]
    for matrix, inverse in zip(matrices, kfac_ext.damped_inverse(matrices, damping)):
        eye = torch.eye(len(matrix), dtype=torch.float64)
        assert float((inverse @ (matrix + damping * eye) - eye).norm()) < 1e-10


@pytest.mark.parametrize("view", ["strided", "rows apart"])
def test_any_strides(device, view):
    matrix = spd(40, torch.float64, device=device)
    wide = torch.full((80, 80), math.nan, device=device, dtype=torch.float64)
    seen = {
        "strided": wide[::2, ::2],
        "rows apart": wide[:40, 3:43],
    }[view]
    seen.copy_(matrix)
    (inverse,) = kfac_ext.damped_inverse([seen], 0.1)
    eye = torch.eye(40, device=device, dtype=torch.float64)
    assert relative_error(inverse, torch.linalg.inv(matrix + 0.1 * eye)) < 1e-11


def test_inputs_are_not_changed(device):
    matrix, diagonal = spd(30, device=device), torch.rand(30, device=device)
    copies = matrix.clone(), diagonal.clone()
    kfac_ext.damped_inverse([matrix], [diagonal])
    assert torch.equal(matrix, copies[0]) and torch.equal(diagonal, copies[1])


EYE = torch.eye(3)
BAD_CALLS = {
    "square": (ValueError, r"matrices\[1\] has shape \(2, 3\), expected \[n, n\]", [EYE, torch.ones(2, 3)], 0.1, None),
    "dtype": (TypeError, r"matrices\[0\] has dtype torch.bfloat16", [EYE.bfloat16()], 0.1, None),
    "mixed": (TypeError, r"matrices\[1\] has dtype torch.float64", [EYE, EYE.double()], 0.1, None),
    "empty": (ValueError, r"matrices\[0\] is empty", [torch.ones(0, 0)], 0.1, None),
    "negative": (ValueError, "damping is -0.1, expected a finite number >= 0", [EYE], -0.1, None),
    "nan": (ValueError, r"damping\[0\] is nan, expected", [EYE], [math.nan], None),
    "text": (TypeError, r"damping\[0\] is a str", [EYE], ["a"], None),
    "count": (ValueError, "damping has 2 entries, expected 1: one for each of matrices", [EYE], [0.1, 0.2], None),
    "length": (ValueError, r"damping\[0\] has shape \(2,\), expected \(\) or \(3,\)", [EYE], [torch.ones(2)], None),
    "device": (ValueError, r"damping\[0\] is on meta", [EYE], [torch.ones(3, device="meta")], None),
    "pi list": (TypeError, "damping, with pi one for all, is a list", [EYE, EYE], [0.1, 0.1], [(0, 1)]),
    "pi range": (ValueError, r"pi\[0\] is \(0, 2\), expected indices of the 2 matrices", [EYE, EYE], 0.1, [(0, 2)]),
    "pi twice": (ValueError, r"pi\[1\] is \(0, 2\), but matrix 0 is in a pair", [EYE] * 3, 0.1, [(0, 1), (0, 2)]),
}


@pytest.mark.parametrize("name", BAD_CALLS)
@pytest.mark.parametrize("native", [True, False])
def test_bad_calls(name, native):
    error, message, matrices, damping, pi = BAD_CALLS[name]
    with kfac_ext.use_native(native), pytest.raises(error, match=f"^damped_inverse: {message}"):
        kfac_ext.damped_inverse(matrices, damping, pi=pi)


# ---- operators ----


@pytest.mark.parametrize("diagonals", [[], [torch.rand(4), torch.empty(0)]])
def test_opcheck(diagonals):
    arguments = ([spd(4), spd(20)], torch.tensor([0.1, 0.2], dtype=torch.float64), diagonals, True)
    torch.library.opcheck(torch.ops.kfac_ext.damped_inverse.default, arguments)


def test_compiles_without_graph_breaks():
    compiled = torch.compile(
        lambda a, b: kfac_ext.damped_inverse([a, b], 0.1)[1] + 1, backend="aot_eager", fullgraph=True
    )
    a, b = spd(4), spd(20)
    assert torch.equal(compiled(a, b), kfac_ext.damped_inverse([a, b], 0.1)[1] + 1)
    with pytest.raises(torch.linalg.LinAlgError, match=r"matrices \[1\] are not positive definite"):
        compiled(a, -b)


def test_meta_tensors():
    assert kfac_ext.damped_inverse([torch.empty(5, 5, device="meta")], 0.1)[0].shape == (5, 5)
    inverses, info = kfac_ext.damped_inverse_ex([torch.empty(5, 5, device="meta")], 0.1)
    assert inverses[0].shape == (5, 5) and info.shape == (1,)


def test_the_reference_serves_when_native_is_off(monkeypatch):
    monkeypatch.delattr(kfac_ext._C, "damped_inverse_cpu")
    with kfac_ext.use_native(False):
        assert torch.allclose(kfac_ext.damped_inverse([EYE], 1.0)[0], EYE / 2)
    with pytest.raises(AttributeError):
        kfac_ext.damped_inverse([EYE], 1.0)


SMOKE = """
import torch, kfac_ext
from kfac_ext import reference
from tests.ops.factor_lists import spd
for dtype, tolerance in ((torch.float32, 3e-4), (torch.float64, 1e-11)):
    matrices = [spd(n, dtype, condition=50) for n in (5, 33, 300)]
    for a, b in zip(kfac_ext.damped_inverse(matrices, 0.01), reference.damped_inverse(matrices, 0.01)):
        assert (a - b).norm() <= tolerance * b.norm()
    values = [m.power_iteration(matrices, tol=1e-6, max_iter=300).eigenvalues for m in (kfac_ext, reference)]
    assert torch.allclose(*values, rtol=tolerance)
    x = torch.randn(3, 4, 9, 9, dtype=dtype)
    for k, p in ((3, 1), (None, 0)):
        values = [m.covariance_power_iteration(x, k, padding=p, max_iter=9).eigenvalues for m in (kfac_ext, reference)]
        assert torch.allclose(*values, rtol=tolerance)
    layer = [torch.randn(21, 36, dtype=dtype)], [spd(36, dtype)], [spd(21, dtype)], [9]
    for name in ("obd_saliency", "obs_saliency"):
        assert torch.allclose(*(getattr(m, name)(*layer)[0] for m in (kfac_ext, reference)), rtol=tolerance)
    pruned = [torch.arange(20)]
    native, plain = (m.compensate(*layer[:2], pruned)[0] for m in (kfac_ext, reference))
    assert (native - plain).norm() <= tolerance * plain.norm()
print(kfac_ext.build_info()["simd"])
"""


@pytest.mark.parametrize("simd", ["baseline", "avx2"])
def test_lesser_instruction_sets(simd):
    environment = {**os.environ, "KFAC_SIMD": simd, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", SMOKE], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] in ("baseline", simd)


def test_opcheck_pi():
    matrices = [spd(4), spd(9), spd(5)]
    torch.library.opcheck(torch.ops.kfac_ext.pi_damping.default, (matrices, 0.1, [0, 2]))
