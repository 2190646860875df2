"""A whole step of a FactorSet the way CUDA tensors go, with simulated threads: it asks the device for nothing."""

import mmap
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import kfac_ext
from kfac_ext import _C, CovarianceUpdate, FactorSet, reference
from kfac_ext.ops import (
    _covariance_kernels,
    _inverse_kernels,
    _power_covariance_kernels,
    _power_kernels,
    covariance,
    covariance_group,
    inverse,
    power,
)
from tests.conftest import relative_error

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense.default,  # .item(), float(), bool()
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.index.Tensor,  # with a mask
}


class NoWaiting(TorchDispatchMode):
    """Refuses what has to know a value on the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in WAITING, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def cuda_way(emulation, monkeypatch):
    """CPU tensors go the way of CUDA tensors; operators are plain functions, so that modes see inside of them."""

    class Both(SimpleNamespace):
        def __getattr__(self, name):
            return getattr(emulation if hasattr(emulation, name) else _C, name)

    modules = (_covariance_kernels, _inverse_kernels, _power_covariance_kernels, _power_kernels)
    caches = [
        c
        for module in (*modules, covariance_group)
        for c in vars(module).values()
        if hasattr(c, "cache_clear") and not isinstance(c, type)
    ]
    for module in modules:
        monkeypatch.setattr(module, "_C", Both())
    monkeypatch.setattr(covariance, "_run", lambda problem: _covariance_kernels.run_cuda([problem]))
    monkeypatch.setattr(covariance_group, "_joins_group", lambda x: True)
    monkeypatch.setattr(inverse, "_run", _inverse_kernels.run_cuda)
    monkeypatch.setattr(power, "_run", _power_kernels.run_cuda)
    monkeypatch.setattr(power, "_run_covariance", _power_covariance_kernels.run_covariance_cuda)
    for module, operator, function in (
        (covariance_group, "_group_op", covariance_group._group),
        (inverse, "_inverse_op", lambda *arguments: inverse._run(*arguments[:3])),
        (power, "_power_op", power._power),
        (power, "_covariance_op", power._covariance),
    ):
        monkeypatch.setattr(module, operator, function)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


SIZES = {"conv.A": 37, "conv.G": 8, "deep.A": (4, 9), "fc.A": 140, "fc.G": 10}


def step(factors, x, h, rows, g):
    kinds, blend = CovarianceUpdate, {"decay": 0.95, "scale": 0.05}
    factors.accumulate_(
        [
            kinds.conv2d("conv.A", x, 3, padding=1, bias=True, **blend),
            kinds.gradient("conv.G", h, mode="reduce", **blend),
            kinds.conv2d("deep.A", x, 3, groups=4, **blend),
            kinds.linear("fc.A", rows, **blend),
            kinds.gradient("fc.G", g, **blend),
        ]
    )
    found = factors.power_iteration_(tol=1e-4, max_iter=300)
    inverses, info = factors.damped_inverse(0.01)
    amounts = [0.01 + 0.001 * i for i in range(3)]
    listed, _ = kfac_ext.damped_inverse_ex([factors[key] for key in ("conv.A", "conv.G", "fc.G")], amounts)
    free = kfac_ext.covariance_power_iteration(x, 3, padding=1, bias=True, tol=1e-4)
    return found, inverses, info, listed, free


def test_no_part_of_a_step_waits_for_the_device(cuda_way):
    inputs = torch.randn(5, 4, 8, 7), torch.randn(5, 8, 8, 7), torch.randn(300, 140), torch.randn(30, 10)
    factors, plain = FactorSet(SIZES), FactorSet(SIZES)
    step(factors, *inputs)  # schedules are made now
    plain.buffer.copy_(factors.buffer)
    with NoWaiting():
        found, inverses, info, listed, free = step(factors, *inputs)
    with kfac_ext.use_native(False):
        wanted, exact_inverses, _, exact_listed, exact_free = step(plain, *inputs)
    assert relative_error(found.eigenvalues, wanted.eigenvalues) < 1e-5 and not info.any()
    for key in SIZES:
        assert relative_error(factors[key], plain[key]) < 1e-6, key
        assert relative_error(inverses[key], exact_inverses[key]) < 1e-4, key
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(listed, exact_listed))
    assert relative_error(free.eigenvalues, exact_free.eigenvalues) < 1e-6


@pytest.mark.parametrize("approx", ["reduce", "expand"])
def test_all_factors_of_a_forward_are_one_launch(cuda_way, approx, monkeypatch):
    """Of a network with a shared, a grouped and a padded layer; second calls wait for first ones."""
    a, b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=2, padding_mode="circular")
    model = nn.Sequential(a, nn.ReLU(), b, nn.ReLU(), b, nn.Flatten(), nn.Linear(4 * 6 * 5, 3))
    x, launches, run = torch.randn(5, 3, 6, 5), [], covariance_group.Launch.run

    def counted(launch, *pointers):
        launches.append(len(launch.members))
        run(launch, *pointers)

    monkeypatch.setattr(covariance_group.Launch, "run", counted)
    factors = []
    for native in (True, False):
        with kfac_ext.use_native(native):
            curvature = kfac_ext.Curvature(model, kfac_approx=approx, generator=torch.Generator().manual_seed(0))
            model(x)
            factors.append(curvature.factors)
            curvature.remove()
        monkeypatch.setattr(covariance_group, "_joins_group", lambda x: False)
    assert launches == ([6] if approx == "reduce" else [6, 2])
    for key in factors[0]:
        assert relative_error(factors[0][key], factors[1][key]) < 1e-5, key


def test_what_waits_is_refused():
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        torch.ones(1).item()


# ---- offsets beyond 32 bits ----


@pytest.fixture
def vast():
    """16 GiB of address space of which only the pages written take memory, as bfloat16."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        memory = mmap.mmap(-1, 1 << 34, flags=flags)
    except (OSError, ValueError) as error:
        pytest.skip(f"no such address space: {error}")
    return torch.frombuffer(memory, dtype=torch.bfloat16)


@pytest.mark.parametrize("strides", [(2**31 + 8, 1), (1, 2**31 // 9 + 5)])
def test_rows_more_than_2_to_the_31_elements_apart(cuda_way, vast, strides):
    x = vast.as_strided((3, 20), strides)
    x.copy_(torch.randn(3, 20))
    assert relative_error(kfac_ext.linear_covariance(x), reference.linear_covariance(x.double())) < 1e-6
    found = kfac_ext.covariance_power_iteration(x, tol=1e-5)
    assert relative_error(found.eigenvalues, reference.covariance_power_iteration(x.double(), tol=1e-5)[0]) < 1e-6


@pytest.mark.parametrize("far", range(4))
def test_images_with_a_dimension_that_spans_more_than_2_to_31(cuda_way, vast, far):
    strides = [105, 35, 7, 1]
    strides[far] = 2**31 + 16
    x = vast.as_strided((3, 3, 3, 3), strides)
    x.copy_(torch.randn(3, 3, 3, 3))
    exact = reference.conv2d_covariance(x.double(), 3, padding=1, bias=True)
    assert relative_error(kfac_ext.conv2d_covariance(x, 3, padding=1, bias=True), exact) < 1e-6
    found = kfac_ext.covariance_power_iteration(x, 3, padding=1, tol=1e-5)
    exact_pair = reference.covariance_power_iteration(x.double(), 3, padding=1, tol=1e-5)
    assert relative_error(found.eigenvalues, exact_pair.eigenvalues) < 1e-6
