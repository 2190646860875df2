"""What only a GPU can show: streams, graphs, devices, no waiting for the device, memory that nothing has written."""

import pytest
import torch

import kfac_ext
from kfac_ext import CovarianceUpdate, FactorSet, reference
from tests.conftest import relative_error

READY = torch.cuda.is_available() and bool(kfac_ext.build_info()["cuda_architectures"])
pytestmark = pytest.mark.skipif(
    not READY, reason="no CUDA device" if not torch.cuda.is_available() else "no CUDA kernels in this build"
)

SIZES = {"conv.A": 577, "conv.G": 128, "fc.A": 700}


def updates(device="cuda", seed=0, decay=0.0):
    torch.manual_seed(seed)
    x, g, rows = (torch.randn(shape, device=device) for shape in [(8, 64, 14, 14), (8, 128, 14, 14), (300, 700)])
    kinds = CovarianceUpdate
    return [
        kinds.conv2d("conv.A", x, 3, padding=1, bias=True, decay=decay),
        kinds.gradient("conv.G", g, decay=decay),
        kinds.linear("fc.A", rows, decay=decay),
    ]


def exact(update):
    x = update.x.double()
    if update.key == "conv.A":
        return reference.conv2d_covariance(x, 3, padding=1, bias=True)
    return (reference.gradient_covariance if update.key == "conv.G" else reference.linear_covariance)(x)


def assert_right(factors, given, tolerance=3e-7):
    for update in given:
        assert relative_error(factors[update.key], exact(update)) < tolerance, update.key


def test_native_kernels_serve():
    kfac_ext.linear_covariance(torch.randn(4, 4, device="cuda"))
    assert kfac_ext.build_info()["cuda_checks"]["covariance on cuda:0"] == "ok"


def test_memory_that_nothing_has_written_is_not_read(poisoned):
    factors, given = FactorSet(SIZES, device="cuda"), updates()
    factors.buffer.fill_(torch.nan)
    factors.accumulate_(given)
    assert_right(factors, given)


def test_no_call_waits_for_the_device():
    factors, given = FactorSet(SIZES, device="cuda"), updates()
    factors.accumulate_(given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        factors.accumulate_(given)
        kfac_ext.conv2d_covariance_(factors["conv.A"], given[0].x, 3, padding=1, bias=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_kernels_run_on_the_current_stream():
    factors, given = FactorSet(SIZES, device="cuda"), updates()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for update in given:
            update.x.mul_(2)
        factors.accumulate_(given)
    stream.synchronize()
    assert_right(factors, given)


def test_a_graph_replays_the_group():
    factors, given = FactorSet(SIZES, device="cuda"), updates(decay=0.5)
    factors.accumulate_(given)  # warm-up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        factors.accumulate_(given)
    for update, other in zip(given, updates(seed=1)):
        update.x.copy_(other.x)
    factors.buffer.zero_()
    graph.replay()
    assert_right(factors, given)
    graph.replay()
    assert relative_error(factors["fc.A"], 1.5 * exact(given[2])) < 3e-7


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_the_second_device():
    factors, given = FactorSet(SIZES, device="cuda:1"), updates("cuda:1")
    assert torch.cuda.current_device() == 0
    factors.accumulate_(given)
    assert torch.cuda.current_device() == 0
    assert_right(factors, given)


@pytest.mark.parametrize("rows, d", [(100_000, 40), (100_000, 130), (70_000, 700)])
def test_long_sums_do_not_drift(rows, d):
    x = torch.randn(rows, d, device="cuda") + 1
    value, plain = kfac_ext.linear_covariance(x), reference.linear_covariance(x)
    truth = reference.linear_covariance(x.double())
    assert relative_error(value, truth) <= max(2 * relative_error(plain, truth), 2e-7)


def test_tf32_is_used_where_torch_may_use_it():
    x = torch.randn(20_000, 256, device="cuda")
    truth = reference.linear_covariance(x.double())
    torch.set_float32_matmul_precision("high")
    try:
        error = relative_error(kfac_ext.linear_covariance(x), truth)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert 1e-6 < error < 1e-4


def test_compiles_without_graph_breaks():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: kfac_ext.linear_covariance(x) + 1, backend="aot_eager", fullgraph=True)
    x = torch.randn(60, 33, device="cuda")
    assert torch.equal(compiled(x), kfac_ext.linear_covariance(x) + 1)


def test_more_than_2_to_the_31_elements():
    rows, d = 2**21, 1040
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    x = torch.randn(rows, d, device="cuda", dtype=torch.bfloat16)
    value = kfac_ext.linear_covariance(x)
    truth = sum(reference.linear_covariance(part.double()) for part in x.chunk(64)) / 64
    assert relative_error(value, truth) < 1e-6
