import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import kfac_ext
from kfac_ext import reference
from kfac_ext.geometry import conv_geometry
from tests.conftest import relative_error
from tests.ops.covariance_oracle import allowed, oracle

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("d", [1, 31, 32, 33, 129])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(device, threads, dtype, d, bias):
    x = torch.randn(77, d, device=device).to(dtype)
    exact = reference.linear_covariance(x.double(), bias=bias)
    value = kfac_ext.linear_covariance(x, bias=bias)
    assert relative_error(value, exact) <= allowed(dtype, reference.linear_covariance(x, bias=bias), exact)
    assert torch.equal(value, value.T)


@pytest.mark.parametrize("rows", [1, 2, 63, 5000, 20000])
def test_linear_of_many_rows(device, threads, rows):
    x = torch.randn(rows, 40, device=device) + 1
    exact = reference.linear_covariance(x.double(), bias=True)
    assert relative_error(kfac_ext.linear_covariance(x, bias=True), exact) < 5e-7


def test_linear_of_a_sequence_counts_every_position(device):
    x = torch.randn(4, 5, 6, device=device, dtype=torch.float64)
    assert relative_error(kfac_ext.linear_covariance(x), reference.linear_covariance(x.flatten(0, 1))) < 1e-14


@pytest.mark.parametrize("view", ["transposed", "strided", "expanded", "misaligned"])
def test_linear_of_any_strides(device, view):
    base = torch.randn(40, 42, device=device, dtype=torch.float64)
    x = {
        "transposed": base.T,
        "strided": base[::2, ::3],
        "expanded": base[:1].expand(7, 42),
        "misaligned": base.flatten()[1:1601].view(40, 40),
    }[view]
    assert relative_error(kfac_ext.linear_covariance(x), reference.linear_covariance(x)) < 1e-14


CONVOLUTIONS = [
    {"shape": (3, 5, 8, 8), "kernel_size": 3, "padding": 1},
    {"shape": (2, 17, 7, 5), "kernel_size": 3, "padding": 1},
    {"shape": (2, 33, 4, 4), "kernel_size": 3, "padding": "same"},
    {"shape": (2, 16, 2, 2), "kernel_size": 3, "padding": 1},
    {"shape": (3, 16, 1, 1), "kernel_size": 3, "padding": 1},
    {"shape": (2, 4, 2, 3), "kernel_size": 5, "padding": 2},
    {"shape": (2, 12, 9, 6), "kernel_size": (3, 5), "padding": (0, 2)},
    {"shape": (2, 9, 8, 8), "kernel_size": 4, "padding": "same"},
    {"shape": (2, 20, 9, 9), "kernel_size": 3, "stride": 2, "padding": 1},
    {"shape": (2, 20, 8, 7), "kernel_size": 3, "stride": (3, 2), "padding": 2},
    {"shape": (2, 16, 11, 11), "kernel_size": 3, "dilation": 2, "padding": 2},
    {"shape": (2, 16, 11, 9), "kernel_size": 3, "dilation": (3, 1), "stride": (1, 2), "padding": "valid"},
    {"shape": (2, 40, 6, 6), "kernel_size": 1},
    {"shape": (2, 40, 6, 6), "kernel_size": 1, "stride": 2},
    {"shape": (2, 3, 16, 16), "kernel_size": 7, "stride": 2, "padding": 3},
    {"shape": (2, 24, 6, 6), "kernel_size": 3, "padding": 1, "groups": 2},
    {"shape": (2, 24, 6, 6), "kernel_size": 3, "padding": 1, "groups": 8},
    {"shape": (2, 24, 6, 6), "kernel_size": 3, "padding": 1, "groups": 24},
    {"shape": (2, 20, 7, 7), "kernel_size": 3, "padding": 1, "groups": 20, "stride": 2},
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=lambda o: "-".join(f"{v}" for v in o.values()))
@pytest.mark.parametrize("mode", ["expand", "reduce"])
@pytest.mark.parametrize("bias", [False, True])
def test_conv2d_against_patches_by_index(device, threads, options, mode, bias):
    options = dict(options)
    x = torch.randn(options.pop("shape"), device=device, dtype=torch.float64)
    value = kfac_ext.conv2d_covariance(x, **options, mode=mode, bias=bias)
    assert relative_error(value, oracle(x, **options, mode=mode, bias=bias)) < 1e-13
    assert torch.equal(value, value.mT)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [3, 16, 70])
def test_conv2d_precision(device, threads, dtype, layout, channels):
    x = torch.randn(6, channels, 13, 10, device=device).to(dtype).contiguous(memory_format=layout)
    exact = reference.conv2d_covariance(x.double(), 3, padding=1, bias=True)
    value = kfac_ext.conv2d_covariance(x, 3, padding=1, bias=True)
    plain = reference.conv2d_covariance(x, 3, padding=1, bias=True)
    assert relative_error(value, exact) <= allowed(dtype, plain, exact)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 3),
    st.sampled_from([1, 2, 5, 8, 16, 17]),
    st.integers(1, 3),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 3), st.integers(0, 3)) | st.sampled_from(["same", "valid"]),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.booleans(),
    st.sampled_from(["expand", "reduce"]),
)
def test_conv2d_of_random_geometry(samples, channels, groups, size, kernel_size, stride, padding, dilation, bias, mode):
    if padding == "same":
        stride = (1, 1)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "bias": bias, "mode": mode}
    x = torch.randn(samples, channels * groups, *size, dtype=torch.float64)
    try:
        conv_geometry(x.shape, kernel_size, stride, padding, dilation, groups)
    except ValueError:
        assume(False)
    exact = reference.conv2d_covariance(x, kernel_size, **options)
    value = kfac_ext.conv2d_covariance(x, kernel_size, **options)
    scale = x.square().mean()  # some geometries meet no pixel at all: then both are zero
    assert float((value - exact).abs().max() / scale) < 1e-13


@pytest.mark.parametrize("algorithm", [1, 2])
def test_both_algorithms_agree(algorithm):
    x = torch.randn(3, 20, 8, 8, dtype=torch.float64)
    out = torch.full((181, 181), math.nan, dtype=torch.float64)
    shape = [*x.shape, 3, 3, 1, 1, 1, 1, 1, 1, 8, 8, 1]
    from kfac_ext import _C

    _C.covariance_cpu(x.data_ptr(), 1, list(x.stride()), shape, False, algorithm, True, 0.0, 1 / 192, out.data_ptr(), 2)
    assert relative_error(out, oracle(x, 3, padding=1, bias=True)) < 1e-13


@pytest.mark.parametrize("shape", [(7, 5), (64, 33), (6, 18, 5, 4), (70, 16, 8, 8)])
@pytest.mark.parametrize("mode", ["expand", "reduce"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_gradient(device, threads, shape, mode, dtype):
    g = torch.randn(shape, device=device).to(dtype)
    exact = reference.gradient_covariance(g.double(), mode=mode)
    plain = reference.gradient_covariance(g, mode=mode)
    value = kfac_ext.gradient_covariance(g, mode=mode)
    assert relative_error(value, exact) <= allowed(dtype, plain, exact)


def test_gradient_sums_positions_and_divides_by_samples(device):
    g = torch.randn(3, 4, 2, 2, dtype=torch.float64, device=device)
    expand = sum(torch.outer(g[n, :, y, x], g[n, :, y, x]) for n in range(3) for y in range(2) for x in range(2)) / 3
    reduce = sum(torch.outer(g[n].sum(dim=(1, 2)), g[n].sum(dim=(1, 2))) for n in range(3)) / 3
    assert relative_error(kfac_ext.gradient_covariance(g), expand) < 1e-14
    assert relative_error(kfac_ext.gradient_covariance(g, mode="reduce"), reduce) < 1e-14


@pytest.mark.parametrize("groups", [2, 6])
def test_gradient_groups_are_the_diagonal_blocks(device, groups):
    g = torch.randn(5, 6, 3, 3, dtype=torch.float64, device=device)
    whole, n = kfac_ext.gradient_covariance(g), 6 // groups
    blocks = torch.stack([whole[i * n : (i + 1) * n, i * n : (i + 1) * n] for i in range(groups)])
    assert relative_error(kfac_ext.gradient_covariance(g, groups=groups), blocks) < 1e-14


CALLS = {
    "linear": (kfac_ext.linear_covariance, kfac_ext.linear_covariance_, (9, 20), {}, {"bias": True}),
    "rows": (kfac_ext.linear_covariance, kfac_ext.linear_covariance_, (9000, 20), {}, {"bias": True}),
    "conv": (
        kfac_ext.conv2d_covariance,
        kfac_ext.conv2d_covariance_,
        (3, 18, 6, 6),
        {"kernel_size": 3},
        {"padding": 1, "bias": True},
    ),
    "depthwise": (
        kfac_ext.conv2d_covariance,
        kfac_ext.conv2d_covariance_,
        (3, 18, 6, 6),
        {"kernel_size": 3},
        {"padding": 1, "groups": 18, "bias": True},
    ),
    "gradient": (kfac_ext.gradient_covariance, kfac_ext.gradient_covariance_, (3, 18, 6, 6), {}, {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_running_average(device, threads, name):
    function, accumulate, shape, lead, options = CALLS[name]
    x = torch.randn(shape, dtype=torch.float64, device=device)
    value = function(x, *lead.values(), **options)
    out = torch.full_like(value, math.nan)
    assert accumulate(out, x, *lead.values(), **options) is out
    assert relative_error(out, value) < 1e-14  # decay 0 forgets NaN
    accumulate(out, x, *lead.values(), decay=0.9, scale=0.5, **options)
    assert relative_error(out, 1.4 * value) < 1e-14


@pytest.mark.parametrize("name", CALLS)
def test_two_runs_are_bitwise_equal(device, threads, name):
    function, _, shape, lead, options = CALLS[name]
    x = torch.randn(shape, device=device)
    assert torch.equal(function(x, *lead.values(), **options), function(x, *lead.values(), **options))


@pytest.mark.parametrize("name", ["linear", "conv", "gradient"])
def test_opcheck(name):
    function, _, shape, lead, options = CALLS[name]
    x = torch.randn(shape)
    out = torch.empty_like(function(x, *lead.values(), **options))
    arguments = {
        "linear": (out, x, True, 0.5, 1.0),
        "conv": (out, x, [3, 3], [1, 1], [1, 1, 1, 1], [1, 1], 1, True, False, 0.5, 1.0),
        "gradient": (out, x, 1, False, 0.5, 1.0),
    }[name]
    name = {"linear": "linear", "conv": "conv2d", "gradient": "gradient"}[name]
    torch.library.opcheck(getattr(torch.ops.kfac_ext, f"{name}_covariance_").default, arguments)


def test_meta_tensors():
    assert kfac_ext.conv2d_covariance(torch.empty(2, 8, 9, 9, device="meta"), 3).shape == (72, 72)


def test_compiles_without_graph_breaks():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: kfac_ext.linear_covariance(x) + 1, backend="aot_eager", fullgraph=True)
    x = torch.randn(6, 3)
    assert torch.equal(compiled(x), kfac_ext.linear_covariance(x) + 1)


def test_inputs_that_require_grad_are_detached():
    x = torch.randn(6, 3, requires_grad=True)
    assert not kfac_ext.linear_covariance(x * 2).requires_grad


def test_nan_and_infinity_stay_visible():
    x = torch.randn(6, 3)
    x[2, 1] = math.nan
    A = kfac_ext.linear_covariance(x)
    assert A[1].isnan().all() and A[:, 1].isnan().all() and A[0, 0].isfinite()


@pytest.mark.parametrize("simd", ["baseline", "avx2"])
def test_other_instruction_sets(simd):
    code = (
        "import torch, kfac_ext\n"
        "x = torch.randn(3, 37, 6, 5)\n"
        "value = kfac_ext.conv2d_covariance(x, 3, padding=1, bias=True).double()\n"
        "exact = kfac_ext.reference.conv2d_covariance(x.double(), 3, padding=1, bias=True)\n"
        "assert (value - exact).norm() / exact.norm() < 1e-6\n"
        "print(kfac_ext.build_info()['simd'])\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "KFAC_SIMD": simd}, capture_output=True, text=True, check=True
    )
    assert run.stdout.split()[-1] in ("baseline", simd)


def test_the_reference_serves_when_native_is_off(monkeypatch):
    x = torch.randn(3, 5, 6, 6)
    monkeypatch.setattr("kfac_ext.ops.covariance._run", lambda *_: pytest.fail("native kernel was called"))
    with kfac_ext.use_native(False):
        value = kfac_ext.conv2d_covariance(x, 3)
        assert torch.equal(value, reference.conv2d_covariance(x, 3))
        kfac_ext.linear_covariance(x)
        kfac_ext.gradient_covariance(x)
    assert kfac_ext.build_info()["native"]


X, Y = torch.randn(2, 6, 8, 8), torch.randn(4, 6)
BAD_CALLS = [
    (lambda: kfac_ext.linear_covariance(torch.empty(0, 4)), ValueError, "linear_covariance: x is empty"),
    (lambda: kfac_ext.linear_covariance(torch.tensor(1.0)), ValueError, "0 dimensions"),
    (lambda: kfac_ext.linear_covariance(torch.ones(3, 2, dtype=torch.int64)), TypeError, "dtype torch.int64"),
    (lambda: kfac_ext.linear_covariance([1.0]), TypeError, "x is a list"),
    (lambda: kfac_ext.linear_covariance(torch.eye(3).to_sparse()), TypeError, "layout"),
    (lambda: kfac_ext.linear_covariance_(torch.zeros(5, 5), Y), ValueError, r"out has shape \(5, 5\).*\(6, 6\)"),
    (lambda: kfac_ext.linear_covariance_(torch.zeros(6, 6).double(), Y), TypeError, "out has dtype torch.float64"),
    (lambda: kfac_ext.linear_covariance_(torch.zeros(12, 6)[::2], Y), ValueError, "out is not contiguous"),
    (lambda: kfac_ext.linear_covariance_(torch.zeros(6, 6, device="meta"), Y), ValueError, "expected the same dev"),
    (lambda: kfac_ext.conv2d_covariance(X[0], 3), ValueError, r"input has 3 dimensions \(6, 8, 8\), expected 4"),
    (lambda: kfac_ext.conv2d_covariance(X, 11), ValueError, "exceeds the padded input"),
    (lambda: kfac_ext.conv2d_covariance(X, 0), ValueError, "kernel_size is"),
    (lambda: kfac_ext.conv2d_covariance(X, (3, 3, 3)), ValueError, "kernel_size is"),
    (lambda: kfac_ext.conv2d_covariance(X, 3, stride=0), ValueError, "stride is"),
    (lambda: kfac_ext.conv2d_covariance(X, 3, padding=-1), ValueError, "padding is"),
    (lambda: kfac_ext.conv2d_covariance(X, 3, padding="full"), ValueError, "padding is 'full'"),
    (lambda: kfac_ext.conv2d_covariance(X, 3, padding="same", stride=2), ValueError, "needs stride 1"),
    (lambda: kfac_ext.conv2d_covariance(X, 3, groups=4), ValueError, "groups is 4"),
    (lambda: kfac_ext.conv2d_covariance(X, 3, mode="mean"), ValueError, "mode is 'mean'"),
    (lambda: kfac_ext.conv2d_covariance_(torch.zeros(9, 9), X, 3), ValueError, "conv2d_covariance: out has shape"),
    (lambda: kfac_ext.gradient_covariance(X[0]), ValueError, "g has 3 dimensions"),
    (lambda: kfac_ext.gradient_covariance(X, groups=5), ValueError, "groups is 5"),
    (lambda: kfac_ext.gradient_covariance(X, mode="x"), ValueError, "mode is 'x'"),
]


@pytest.mark.parametrize("call, error, message", BAD_CALLS, ids=[message for *_, message in BAD_CALLS])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_bad_input_leaves_out_unchanged():
    out = torch.full((6, 6), 7.0)
    with pytest.raises(TypeError):
        kfac_ext.linear_covariance_(out, torch.ones(4, 6, dtype=torch.int32))
    assert bool((out == 7).all())


def test_long_sums_lose_no_more_than_short_ones(threads):
    value = float(torch.tensor(0.9))
    rows = torch.full((1, 4), value).expand(3_000_000, 4)
    images = torch.full((1, 1, 1, 1), value).expand(8, 3, 512, 512)
    for A in (kfac_ext.linear_covariance(rows, bias=True), kfac_ext.conv2d_covariance(images, 3, bias=True)):
        torch.testing.assert_close(
            A[:-1, :-1].double(), torch.full_like(A[:-1, :-1], value**2).double(), rtol=8e-5, atol=0
        )


def test_works_in_a_forked_child():
    program = textwrap.dedent(
        """
        import os, torch, kfac_ext
        torch.set_num_threads(2)
        x = torch.randn(16, 20, 12, 12)
        A = kfac_ext.conv2d_covariance(x, 3, padding=1)
        child = os.fork()
        if child == 0:
            os._exit(0 if kfac_ext.conv2d_covariance(x, 3, padding=1).sub(A).abs().max() < 1e-5 else 3)
        print(os.waitpid(child, 0)[1])
        """
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "0"
