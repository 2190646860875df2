import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import kfac_ext
from kfac_ext import reference
from tests.conftest import relative_error
from tests.ops.factor_lists import SIZES, spd

pytestmark = pytest.mark.usefixtures("poisoned")


def residual(matrix, value, vector):
    product = matrix.double() @ vector.double()
    return float((product - value.double() * vector.double()).norm() / value.double().abs())


# ---- matrices ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigenpairs(device, threads, dtype):
    matrices = [spd(n, dtype, device=device) for n in [*SIZES, 255, 256, 257, 770, 1024]]
    tol = 1e-6 if dtype == torch.float32 else 1e-10
    result = kfac_ext.power_iteration(matrices, tol=tol, max_iter=500)
    assert bool((result.residuals <= tol).all())
    assert [len(v) for v in result.eigenvectors] == [len(m) for m in matrices]
    for matrix, value, vector in zip(matrices, result.eigenvalues, result.eigenvectors):
        largest = torch.linalg.eigvalsh(matrix.double())[-1]
        assert abs(float(value / largest) - 1) < (5e-7 if dtype == torch.float32 else 1e-13)
        assert float(vector.norm()) == pytest.approx(1, abs=1e-6)
        assert residual(matrix, value, vector) < 2 * tol  # one step further than the residual returned


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 5, 17, 64, 255, 256, 300, 900])
def test_the_steps_are_those_of_the_reference(device, threads, dtype, n):
    matrix = spd(n, torch.float64, condition=30, seed=1, device=device)
    native = kfac_ext.power_iteration([matrix.to(dtype)], tol=1e-4, max_iter=40)
    plain = reference.power_iteration([matrix], tol=1e-4, max_iter=40)
    assert native.iterations.dtype == torch.int32 and torch.equal(native.iterations, plain.iterations)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert relative_error(native.eigenvalues, plain.eigenvalues) < tolerance
    assert relative_error(native.eigenvectors[0], plain.eigenvectors[0]) < 10 * tolerance
    # a residual of 1e-4 is known to 1e-6 in float32
    assert float((native.residuals - plain.residuals).abs().max()) < tolerance


def test_a_residual_near_rounding_can_be_trusted(device):
    matrix = spd(600, torch.float32, condition=10, device=device)
    result = kfac_ext.power_iteration([matrix], tol=3e-7, max_iter=200)
    assert float(result.residuals) <= 3e-7
    assert residual(matrix, result.eigenvalues[0], result.eigenvectors[0]) < 1e-6


def test_a_warm_start_needs_fewer_steps(device):
    matrix = spd(100, condition=10, device=device)
    cold = kfac_ext.power_iteration([matrix])
    warm = kfac_ext.power_iteration([matrix + 1e-3 * spd(100, seed=2, device=device)], cold.eigenvectors)
    assert int(warm.iterations) < int(cold.iterations)


def test_in_place_overwrites_the_vectors(device):
    matrices, vectors = [spd(3, device=device), spd(40, device=device)], [torch.ones(3), 7 * torch.ones(40)]
    vectors = [v.to(device) for v in vectors]
    result = kfac_ext.power_iteration_(vectors, matrices, tol=1e-6)
    assert all(a is b for a, b in zip(result.eigenvectors, vectors))
    expected = kfac_ext.power_iteration(
        matrices, [torch.ones(3, device=device), torch.ones(40, device=device)], tol=1e-6
    )
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(vectors, expected.eigenvectors))


def test_vectors_given_stay_as_they_are(device):
    start = torch.ones(9, device=device)
    kfac_ext.power_iteration([spd(9, device=device)], [start])
    assert torch.equal(start, torch.ones(9, device=device))


def test_the_zero_matrix(device):
    result = kfac_ext.power_iteration([torch.zeros(5, 5, device=device), torch.zeros(300, 300, device=device)])
    assert result.eigenvalues.tolist() == [0, 0] and result.residuals.tolist() == [0, 0]
    assert all(float(v.norm()) == pytest.approx(1) for v in result.eigenvectors)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("n", [4, 300, 900])
@pytest.mark.parametrize("native", [True, False])
def test_a_matrix_that_is_not_finite(device, threads, bad, n, native):
    matrix = spd(n, device=device)
    matrix[n // 2, n // 3] = matrix[n // 3, n // 2] = bad
    vectors = [torch.ones(n, device=device), torch.ones(n, device=device)]
    with kfac_ext.use_native(native):
        result = kfac_ext.power_iteration_(vectors, [matrix, spd(n, device=device)], tol=1e-5, max_iter=100)
    assert math.isnan(result.eigenvalues[0]) and math.isnan(result.residuals[0])
    assert int(result.iterations[0]) < 10
    assert float(vectors[0].norm()) == pytest.approx(1, abs=1e-5)
    assert float(result.eigenvalues[1]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("start", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("native", [True, False])
def test_a_useless_start_is_replaced(device, start, native):
    with kfac_ext.use_native(native):
        result = kfac_ext.power_iteration([spd(20, device=device)], [torch.full((20,), start, device=device)], tol=1e-5)
    assert float(result.eigenvalues) == pytest.approx(1, abs=1e-5)


def test_a_negative_eigenvalue_of_largest_magnitude(device):
    result = kfac_ext.power_iteration([torch.diag(torch.tensor([-3.0, 1.0], device=device))], tol=1e-6)
    assert float(result.eigenvalues) == pytest.approx(-3, abs=1e-5)


@pytest.mark.parametrize("view", ["transposed", "strided", "rows apart", "expanded"])
@pytest.mark.parametrize("n", [20, 300])
def test_any_strides(device, view, n):
    matrix = spd(n, torch.float64, device=device)
    wide = torch.full((2 * n, 2 * n), math.nan, device=device, dtype=torch.float64)
    seen = {
        "transposed": matrix.T,
        "strided": wide[::2, ::2],
        "rows apart": wide[:n, 3 : 3 + n],
        "expanded": torch.ones(1, 1, device=device, dtype=torch.float64).expand(n, n),
    }[view]
    if view in ("strided", "rows apart"):
        seen.copy_(matrix)
    result = kfac_ext.power_iteration([seen], tol=1e-10, max_iter=500)
    assert float(result.eigenvalues) == pytest.approx(float(torch.linalg.eigvalsh(seen.contiguous())[-1]), rel=1e-12)


def test_an_empty_list():
    result = kfac_ext.power_iteration([])
    assert len(result.eigenvalues) == len(result.eigenvectors) == len(result.residuals) == len(result.iterations) == 0


def test_the_number_of_threads_changes_nothing():
    matrices = [spd(n) for n in (300, 800, 1000)]
    found = []
    for count in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        found.append(kfac_ext.power_iteration(matrices).eigenvectors)
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=6), st.integers(0, 9))
def test_random_lists(sizes, seed):
    matrices = [spd(n, torch.float64, condition=20, seed=seed) for n in sizes]
    result = kfac_ext.power_iteration(matrices, tol=1e-9, max_iter=1000)
    for matrix, value in zip(matrices, result.eigenvalues):
        assert float(value) == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-12)


EYE = torch.eye(3)
BAD_CALLS = {
    "list": (TypeError, "matrices is a int, expected a list", 3, {}),
    "tensor": (TypeError, r"matrices\[1\] is a list, expected a tensor", [EYE, [1.0]], {}),
    "square": (ValueError, r"matrices\[1\] has shape \(2, 3\), expected \[n, n\]", [EYE, torch.ones(2, 3)], {}),
    "dimensions": (ValueError, r"matrices\[0\] has 1 dimensions", [torch.ones(3)], {}),
    "empty": (ValueError, r"matrices\[0\] is empty", [torch.ones(0, 0)], {}),
    "dtype": (TypeError, r"matrices\[0\] has dtype torch.float16, expected float32 or float64", [EYE.half()], {}),
    "integers": (TypeError, r"matrices\[0\] has dtype torch.int64", [EYE.long()], {}),
    "mixed": (
        TypeError,
        r"matrices\[1\] has dtype torch.float64, the first matrix torch.float32",
        [EYE, EYE.double()],
        {},
    ),
    "device": (ValueError, r"matrices\[1\] is on meta, the first matrix on cpu", [EYE, EYE.to("meta")], {}),
    "sparse": (TypeError, r"matrices\[0\] has layout torch.sparse_coo", [EYE.to_sparse()], {}),
    "tol": (ValueError, "tol is -1, expected a finite number >= 0", [EYE], {"tol": -1}),
    "nan tol": (ValueError, "tol is nan", [EYE], {"tol": math.nan}),
    "max_iter": (ValueError, "max_iter is 0, expected an int >= 1", [EYE], {"max_iter": 0}),
    "count": (ValueError, "vectors has 0 entries, expected 1: one for each of matrices", [EYE], {"vectors": []}),
    "length": (ValueError, r"vectors\[0\] has shape \(2,\), expected \(3,\)", [EYE], {"vectors": [torch.ones(2)]}),
    "vector": (TypeError, r"vectors\[0\] has dtype torch.float64", [EYE], {"vectors": [torch.ones(3).double()]}),
}


@pytest.mark.parametrize("name", BAD_CALLS)
@pytest.mark.parametrize("native", [True, False])
def test_bad_calls(name, native):
    error, message, matrices, options = BAD_CALLS[name]
    with kfac_ext.use_native(native), pytest.raises(error, match=f"^power_iteration: {message}"):
        kfac_ext.power_iteration(matrices, **options)


def test_vectors_in_place_of_any_strides(device):
    matrices = [spd(n, torch.float32, device=device) for n in (3, 40)]
    columns = torch.ones(40, 2, device=device)
    kfac_ext.power_iteration_([columns[:3, 0], columns[:, 1]], matrices)
    expected = kfac_ext.power_iteration(matrices, [torch.ones(n, device=device) for n in (3, 40)]).eigenvectors
    assert torch.equal(columns[:3, 0], expected[0]) and torch.equal(columns[:, 1], expected[1])
    assert bool((columns[3:, 0] == 1).all())


@pytest.mark.parametrize("starts", [[0], [0, 4, 8], [-1, 4], [0, 5]])
def test_starts_that_do_not_fit(starts):
    vectors = torch.ones(8)
    with pytest.raises(ValueError, match=r"^power_iteration: starts"):
        torch.ops.kfac_ext.power_iteration_.default(vectors, starts, [spd(4), spd(4)], 1e-3, 5)
    assert bool((vectors == 1).all())


# ---- covariances ----

CONVOLUTIONS = [
    ((4, 3, 9, 11), {"kernel_size": 3, "padding": 1}),
    ((4, 3, 9, 11), {"kernel_size": 3, "padding": "same", "bias": True}),
    ((4, 5, 9, 11), {"kernel_size": (3, 2), "padding": (2, 1), "stride": (2, 3), "dilation": (2, 1)}),
    ((3, 8, 12, 12), {"kernel_size": 1, "stride": 2}),
    ((2, 16, 70, 70), {"kernel_size": 5, "padding": 2, "bias": True}),  # several chunks an image
    ((40, 6, 2, 2), {"kernel_size": 3, "padding": 1}),
    ((1, 1, 1, 1), {"kernel_size": 1}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape, options", CONVOLUTIONS)
def test_convolution(device, threads, dtype, shape, options):
    x = (torch.randn(shape, device=device) + 0.5).to(dtype)
    exact = kfac_ext.reference.conv2d_covariance(x.double(), **options)
    result = kfac_ext.covariance_power_iteration(x, **options, tol=2e-6, max_iter=400)
    assert float(result.residuals) <= 2e-6
    assert float(result.eigenvalues) == pytest.approx(float(torch.linalg.eigvalsh(exact)[-1]), rel=1e-6)
    assert residual(exact, result.eigenvalues[0], result.eigenvectors[0]) < 4e-6
    assert result.eigenvectors[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 31), (50, 64), (9, 5, 33), (3000, 17), (12,)])
@pytest.mark.parametrize("bias", [False, True])
def test_rows(device, threads, dtype, shape, bias):
    x = (torch.randn(shape, device=device) + 0.5).to(dtype)
    exact = kfac_ext.reference.linear_covariance(x.double(), bias=bias)
    result = kfac_ext.covariance_power_iteration(x, bias=bias, tol=2e-6, max_iter=400)
    assert float(result.eigenvalues) == pytest.approx(float(torch.linalg.eigvalsh(exact)[-1]), rel=1e-6)
    assert residual(exact, result.eigenvalues[0], result.eigenvectors[0]) < 4e-6


@pytest.mark.parametrize("kernel_size", [None, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_matrix_free_steps_are_those_of_the_reference(device, kernel_size, bias):
    x = torch.randn(6, 4, 8, 9, device=device, dtype=torch.float64)
    start = torch.randn((36 if kernel_size else 9) + bias, device=device, dtype=torch.float64)
    calls = [(module.covariance_power_iteration)(x, kernel_size, start, bias=bias) for module in (kfac_ext, reference)]
    assert torch.equal(calls[0].iterations, calls[1].iterations)
    for native, plain in zip(calls[0], calls[1]):
        native, plain = (t[0] if isinstance(t, list) else t for t in (native, plain))
        assert relative_error(native, plain) < 1e-11


@pytest.mark.parametrize("layout", ["channels_last", "cropped", "transposed rows"])
def test_matrix_free_of_any_strides(device, layout):
    x = torch.randn(5, 4, 8, 9, device=device, dtype=torch.float64)
    seen = {
        "channels_last": x.to(memory_format=torch.channels_last),
        "cropped": x[::2, 1:, 1:-1, ::2],
        "transposed rows": x[0, 0].T,
    }[layout]
    kernel = 3 if seen.dim() == 4 else None
    native = kfac_ext.covariance_power_iteration(seen, kernel, tol=1e-9, max_iter=500)
    plain = kfac_ext.reference.covariance_power_iteration(seen, kernel, tol=1e-9, max_iter=500)
    assert relative_error(native.eigenvalues, plain.eigenvalues) < 1e-12


@pytest.mark.parametrize("shape, kernel", [((6, 5), None), ((2, 3, 6, 6), 3)])
def test_matrix_free_input_that_is_not_finite(device, shape, kernel):
    x = torch.randn(shape, device=device)
    x.view(-1)[4] = math.nan
    result = kfac_ext.covariance_power_iteration(x, kernel)
    assert math.isnan(result.eigenvalues) and math.isnan(result.residuals) and int(result.iterations) == 1


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_convolutions(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    kernel, stride, dilation = ((draw(1, 4), draw(1, 4)), (draw(1, 3), draw(1, 3)), (draw(1, 2), draw(1, 2)))
    padding = (draw(0, 2), draw(0, 2))
    size = [max(1, draw(1, 9) + (k - 1) * d - 2 * p) for k, d, p in zip(kernel, dilation, padding)]
    x = torch.randn(draw(1, 4), draw(1, 4), *size, dtype=torch.float64)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "bias": draw(0, 1) == 1}
    native = kfac_ext.covariance_power_iteration(x, kernel, **options, tol=0, max_iter=3)
    plain = reference.covariance_power_iteration(x, kernel, **options, tol=0, max_iter=3)
    assert torch.allclose(native.eigenvalues, plain.eigenvalues, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize(
    "message, x, lead, options",
    [
        ("x has dtype torch.int64", torch.ones(2, 2).long(), (), {}),
        ("x is empty", torch.ones(0, 3), (), {}),
        ("x has 0 dimensions", torch.tensor(1.0), (), {}),
        ("input has 2 dimensions", torch.ones(2, 3), (3,), {}),
        (r"kernel_size \(5, 5\) with dilation", torch.ones(1, 1, 3, 3), (5,), {}),
        (r"vector has shape \(4,\), expected \(9,\)", torch.ones(1, 1, 3, 3), (3, torch.ones(4)), {}),
        (
            "vector has dtype torch.float64, expected torch.float32",
            torch.ones(2, 3),
            (None, torch.ones(3).double()),
            {},
        ),
        ("vector is a list", torch.ones(2, 3), (None, [1.0]), {}),
        ("max_iter is 1.5", torch.ones(2, 3), (), {"max_iter": 1.5}),
        (r"stride is \(2, 1\), expected 1 without a kernel_size", torch.ones(2, 3), (), {"stride": (2, 1)}),
        ("padding is 'same', expected 0 without a kernel_size", torch.ones(2, 3), (), {"padding": "same"}),
        ("dilation is 1.5, expected an int or two ints", torch.ones(2, 3), (), {"dilation": 1.5}),
    ],
)
def test_bad_matrix_free_calls(message, x, lead, options):
    with pytest.raises((TypeError, ValueError), match=f"^covariance_power_iteration: {message}"):
        kfac_ext.covariance_power_iteration(x, *lead, **options)


# ---- operators ----


@pytest.mark.parametrize("place", range(3))
def test_the_operator_refuses_moves_without_a_kernel(place):
    moves = [[1, 1] if place == i else [] for i in range(3)]
    name = ("stride", "padding", "dilation")[place]
    with pytest.raises(ValueError, match=rf"{name} is \[1, 1\], expected \[\] without a kernel_size"):
        torch.ops.kfac_ext.covariance_power_iteration_(torch.ones(3), torch.ones(2, 3), [], *moves, False, 0.0, 1)


def test_opcheck():
    ops = torch.ops.kfac_ext
    torch.library.opcheck(ops.power_iteration_.default, (torch.ones(25), [21, 0], [spd(4), spd(20)], 1e-3, 5))
    x = torch.randn(2, 3, 5, 5)
    arguments = (torch.ones(28), x, [3, 3], [1, 1], [1, 1, 1, 1], [1, 1], True, 1e-3, 5)
    torch.library.opcheck(ops.covariance_power_iteration_.default, arguments)


def test_the_default_start_outlives_fake_tensors():
    with FakeTensorMode():
        assert kfac_ext.power_iteration([torch.eye(7)]).eigenvalues.shape == (1,)
    assert kfac_ext.power_iteration([torch.eye(7)]).eigenvalues.tolist() == pytest.approx([1.0])
    with FakeTensorMode():
        assert kfac_ext.power_iteration([torch.eye(7)]).eigenvalues.shape == (1,)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic):
    compiled = torch.compile(
        lambda m, x: kfac_ext.power_iteration([m]).eigenvalues + kfac_ext.covariance_power_iteration(x, 3).eigenvalues,
        backend="aot_eager",
        fullgraph=True,
        dynamic=dynamic,
    )
    x = torch.randn(2, 3, 5, 5)
    expected = kfac_ext.power_iteration([EYE]).eigenvalues + kfac_ext.covariance_power_iteration(x, 3).eigenvalues
    torch.testing.assert_close(compiled(EYE, x), expected)


def test_the_reference_serves_when_native_is_off(monkeypatch):
    monkeypatch.delattr(kfac_ext._C, "power_iteration_cpu")
    monkeypatch.delattr(kfac_ext._C, "patch_covariance_power_iteration_cpu")
    x = torch.randn(2, 3, 5, 5)
    with kfac_ext.use_native(False):
        assert kfac_ext.power_iteration([EYE]).eigenvalues.tolist() == pytest.approx([1.0])
        value = kfac_ext.covariance_power_iteration(x, 3, padding=1).eigenvalues
    assert torch.allclose(value, reference.covariance_power_iteration(x, 3, padding=1).eigenvalues)
    with pytest.raises(AttributeError):
        kfac_ext.power_iteration([EYE])
