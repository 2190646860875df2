"""The CUDA covariance without a GPU: its kernels with simulated threads, alone and under the public functions."""

import math
import subprocess
from types import SimpleNamespace

import pytest
import torch

import kfac_ext
from kfac_ext import _C, CovarianceUpdate, FactorSet, reference
from kfac_ext.ops import _covariance_kernels as kernels
from kfac_ext.ops import covariance, covariance_group
from kfac_ext.ops._launch import full_precision, tf32_allowed
from kfac_ext.ops.covariance_group import covariance_group_
from tests.conftest import relative_error, thorough
from tests.ops.test_covariance import CONVOLUTIONS, allowed, oracle

CASES = ["kinds", "mlp", "offsets", "parts", "resnet32", "vgg19", "wide"]


@pytest.mark.parametrize("case", thorough(CASES, but=["kinds", "offsets", "parts", "wide"]))
def test_schedules_against_patches_multiplied_out(build_target, case):
    program = build_target("covariance_emulation") / "covariance_emulation"
    run = subprocess.run([program, case], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture
def launches(emulation, monkeypatch):
    """CPU tensors go the way of CUDA tensors; a list of the number of layers in each launch."""
    counts = []

    def launch(group, descriptors, workspace, images, *rest):
        counts.append(len(images))
        emulation.covariance_cuda(group, descriptors, workspace, images, *rest)

    compiled = {"CovarianceGroup": _C.CovarianceGroup, "max_group_layers": _C.max_group_layers}
    monkeypatch.setattr(kernels, "_C", SimpleNamespace(**compiled, covariance_cuda=launch))
    monkeypatch.setattr(covariance, "_run", lambda problem: kernels.run_cuda([problem]))
    monkeypatch.setattr(covariance_group, "_joins_group", lambda x: x.dtype != torch.float64)
    return counts


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=lambda o: "-".join(f"{v}" for v in o.values()))
@pytest.mark.parametrize("mode", ["expand", "reduce"])
@pytest.mark.parametrize("bias", [False, True])
def test_conv2d(launches, options, mode, bias):
    options = dict(options)
    x = torch.randn(options.pop("shape"))
    value = kfac_ext.conv2d_covariance(x, **options, mode=mode, bias=bias)
    assert relative_error(value, oracle(x, **options, mode=mode, bias=bias)) < 3e-7
    assert torch.equal(value, value.mT)
    assert launches == [1]


@pytest.fixture(params=["set_float32_matmul_precision", "allow_tf32", "fp32_precision"])
def tf32(request):
    """tf32(True or False) sets what PyTorch may do, in each of the ways that it has had."""
    matmul = torch.backends.cuda.matmul
    if request.param == "fp32_precision" and not hasattr(matmul, "fp32_precision"):
        pytest.skip("since torch 2.9")

    def allow(yes):
        if request.param == "set_float32_matmul_precision":
            torch.set_float32_matmul_precision("high" if yes else "highest")
        elif request.param == "allow_tf32":
            matmul.allow_tf32 = yes
        else:
            matmul.fp32_precision = "tf32" if yes else "ieee"

    yield allow
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [3, 16, 70])
def test_precision(launches, dtype, layout, channels):
    x = torch.randn(6, channels, 13, 10).to(dtype).contiguous(memory_format=layout)
    exact = reference.conv2d_covariance(x.double(), 3, padding=1, bias=True)
    plain = reference.conv2d_covariance(x, 3, padding=1, bias=True)
    value = kfac_ext.conv2d_covariance(x, 3, padding=1, bias=True)
    assert relative_error(value, exact) <= max(allowed(dtype, plain, exact), 2e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(300, 20), (70, 40), (40, 130), (3, 20, 7, 6), (2, 130, 4, 4)], ids=str)
@pytest.mark.parametrize("tf32", ["set_float32_matmul_precision"], indirect=True)
def test_products_of_halves_are_exact_in_tf32_too(launches, tf32, dtype, shape):
    tf32(True)
    g = (torch.randn(shape) + 0.5).to(dtype)
    assert relative_error(kfac_ext.gradient_covariance(g), reference.gradient_covariance(g.double())) < 3e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_averages_of_halves_keep_their_digits(launches, dtype):
    x = (torch.randn(30, 20, 7, 6) + 0.5).to(dtype)
    exact = reference.conv2d_covariance(x.double(), 3, mode="reduce")
    assert relative_error(kfac_ext.conv2d_covariance(x, 3, mode="reduce"), exact) < 3e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_halves_that_are_not_finite_stay_in_their_rows(launches, dtype, value):
    x = torch.randn(40, 20).to(dtype)
    x[33, 3] = value
    A = kfac_ext.linear_covariance(x)
    rest = [*range(3), *range(4, 20)]
    assert not A[3].isfinite().any() and not A[:, 3].isfinite().any() and A[rest][:, rest].isfinite().all()


def test_the_smallest_halves_count(launches):
    x = torch.full((64, 8), 2.0**-24, dtype=torch.float16)  # the least that is not 0
    assert torch.equal(kfac_ext.linear_covariance(x), torch.full((8, 8), 2.0**-48))


def test_tf32_follows_torchs_setting(launches, tf32):
    x = torch.randn(2000, 40)
    exact = reference.linear_covariance(x.double())
    tf32(True)
    assert 1e-6 < relative_error(kfac_ext.linear_covariance(x), exact) < 2e-4
    with full_precision(x.device):
        assert not tf32_allowed()
    assert tf32_allowed()
    tf32(False)
    assert relative_error(kfac_ext.linear_covariance(x), exact) < 3e-7


@pytest.mark.parametrize("view", ["transposed", "strided", "expanded", "misaligned"])
def test_any_strides(launches, view):
    base = torch.randn(40, 42)
    x = {
        "transposed": base.T,
        "strided": base[::2, ::3],
        "expanded": base[:1].expand(7, 42),
        "misaligned": base.flatten()[1:1601].view(40, 40),
    }[view]
    assert relative_error(kfac_ext.linear_covariance(x), reference.linear_covariance(x.double())) < 3e-7


def test_crops_of_images_in_any_layout(launches):
    x = torch.randn(5, 12, 9, 11).permute(2, 0, 3, 1)[::2, 1:4, ::3, 1:]
    exact = oracle(x, 3, padding=1)
    assert relative_error(kfac_ext.conv2d_covariance(x, 3, padding=1), exact) < 3e-7


@pytest.mark.parametrize("shape", [(7, 5), (64, 33), (6, 18, 5, 4), (40, 16, 8, 8)])
@pytest.mark.parametrize("mode", ["expand", "reduce"])
@pytest.mark.parametrize("groups", [1, 2])
def test_gradient(launches, shape, mode, groups):
    g = torch.randn(shape[0], shape[1] // groups * groups, *shape[2:])
    exact = reference.gradient_covariance(g.double(), mode=mode, groups=groups)
    assert relative_error(kfac_ext.gradient_covariance(g, mode=mode, groups=groups), exact) < 4e-7


def test_nan_stays_in_its_rows(launches):
    x = torch.randn(6, 40)
    x[2, 1] = math.nan
    A = kfac_ext.linear_covariance(x, bias=True)
    rest = [0, *range(2, 41)]
    assert A[1].isnan().all() and A[:, 1].isnan().all() and A[rest][:, rest].isfinite().all()


def network_updates(decay):
    torch.manual_seed(1)
    x, h, z, v = torch.randn(3, 3, 9, 9), torch.randn(3, 16, 9, 9), torch.randn(3, 10), torch.randn(3, 40)
    kinds = CovarianceUpdate
    return [
        kinds.conv2d("stem.A", x, 3, padding=1, bias=True, decay=decay, scale=0.3),
        kinds.gradient("stem.G", h, decay=decay, scale=2.0),
        kinds.conv2d("body.A", h, (3, 1), stride=(2, 1), padding=(1, 0), mode="reduce", decay=decay, scale=0.3),
        kinds.conv2d("deep.A", h, 3, padding="same", groups=16, decay=decay),
        kinds.linear("head.A", v, bias=True, decay=decay),
        kinds.gradient("head.G", z, mode="reduce", decay=decay),
    ]


SIZES = {"stem.A": 28, "stem.G": 16, "body.A": 48, "deep.A": (16, 9), "head.A": 41, "head.G": 10}


@pytest.mark.parametrize("decay", [0.0, 0.95])
def test_factors_accumulate_in_one_launch(launches, decay):
    factors, alone = FactorSet(SIZES), FactorSet(SIZES)
    alone.buffer.normal_()
    factors.buffer.copy_(alone.buffer)
    factors.accumulate_(network_updates(decay))
    assert launches == [len(SIZES)]
    with kfac_ext.use_native(False):
        for update in network_updates(decay):
            alone.accumulate_([update])
    for key in SIZES:
        assert relative_error(factors[key], alone[key]) < 1e-6, key


def test_an_out_that_comes_twice_waits_for_the_next_launch(launches):
    factors = FactorSet({"fc.A": 4, "fc.G": 2})
    x, y, g = torch.randn(8, 4), torch.randn(8, 4), torch.randn(8, 2)
    kinds = CovarianceUpdate
    factors.accumulate_([kinds.linear("fc.A", x), kinds.gradient("fc.G", g), kinds.linear("fc.A", y, decay=0.5)])
    assert launches == [2, 1]
    exact = 0.5 * reference.linear_covariance(x) + reference.linear_covariance(y)
    assert relative_error(factors["fc.A"], exact) < 1e-6


def test_a_list_of_the_same_shapes_is_planned_once(launches, monkeypatch):
    made = []
    monkeypatch.setattr(covariance_group, "spec_of", lambda *given: made.append(1) or kernels.spec_of(*given))
    covariance_group._plans.cache_clear()
    outs = torch.zeros(2, 6, 6)
    rows, others = torch.randn(2, 9, 6), torch.randn(2, 6, 9).mT
    crossed = torch.randn(4, 2, 3, 6).permute(1, 0, 2, 3)  # no strides describe its rows: copied at each call
    for xs in (rows, 2 * rows, others, crossed, 3 * crossed):
        covariance_group_(list(outs), [CovarianceUpdate.linear("", x) for x in xs])
        for x, out in zip(xs, outs):
            assert relative_error(out, reference.linear_covariance(x.double())) < 3e-7
    assert len(made) == 3 * 2
    with pytest.raises(ValueError, match="out has shape"):
        covariance_group_([outs[0], torch.zeros(5, 5)], [CovarianceUpdate.linear("", x) for x in rows])
    assert len(made) == 3 * 2
    covariance_group._plans.cache_clear()


def test_many_layers_and_a_large_workspace_take_more_launches(launches, monkeypatch):
    covariance_group._plans.cache_clear()
    outs = [torch.empty(3, 3) for _ in range(300)]
    x = torch.randn(5, 3)
    covariance_group_(outs, [CovarianceUpdate.linear("", x)] * 300)
    assert sum(launches) == 300 and max(launches) <= _C.max_group_layers
    assert all(torch.equal(out, outs[0]) for out in outs)
    launches.clear()
    monkeypatch.setattr(kernels, "_WORKSPACE_BYTES", 40_000)
    covariance_group_(outs[:12], [CovarianceUpdate.linear("", x)] * 12)
    assert sum(launches) == 12 and 1 < len(launches) < 12
    covariance_group._plans.cache_clear()


def test_kernels_without_a_gpu_pass_their_own_check(launches):
    assert kernels._check(torch.device("cpu")) < 0.5


def test_rows_beyond_32_bits_are_left_to_the_reference():
    x = torch.empty(1).expand(2**16, 1, 2**8, 2**7)
    assert not kernels.fits_cuda(kernels.gradient_problem(x, torch.empty(1, 1), 1, False, 0.0, 1.0))
    with pytest.raises(ValueError, match="2147483648 rows, expected less than 2"):
        _C.CovarianceGroup(
            [(0, (1, 1, 1, 1), (2**16, 1, 2**8, 2**7, *[1] * 4, 0, 0, 1, 1, 2**8, 2**7, 1), False, 0, False, 0)]
        )
