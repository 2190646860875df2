"""Power iteration, inverses and scores as only a GPU can show them: graphs, streams, no waiting, the same bits."""

import pytest
import torch

import kfac_ext
from kfac_ext import CovarianceUpdate, FactorSet, reference
from tests.conftest import relative_error

READY = torch.cuda.is_available() and bool(kfac_ext.build_info()["cuda_architectures"])
pytestmark = pytest.mark.skipif(
    not READY, reason="no CUDA device" if not torch.cuda.is_available() else "no CUDA kernels in this build"
)

SIZES = {"stem.A": 28, "stem.G": 64, "body.A": 577, "body.G": 128, "wide.A": 1153, "head.G": 10}


def filled():
    """Factors, and copies in float64."""
    generator = torch.Generator("cuda").manual_seed(0)
    factors = FactorSet(SIZES, device="cuda")
    for key, n in SIZES.items():
        x = torch.randn(2 * n, n, device="cuda", generator=generator) + 0.3
        factors[key].copy_(x.mT @ x / len(x))
    return factors, [factors[key].double() for key in SIZES]


def layers():
    generator = torch.Generator("cuda").manual_seed(1)
    result = []
    for outputs, neurons, block in ((64, 64, 9), (128, 300, 1), (10, 7, 25)):
        V = torch.randn(outputs, neurons * block, device="cuda", generator=generator)
        g = torch.randn(3 * outputs, outputs, device="cuda", generator=generator)
        result.append((V, V.mT @ V + torch.eye(neurons * block, device="cuda"), g.mT @ g, block))
    return map(list, zip(*result))


@pytest.fixture
def no_waiting():
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


PAIR = (list(SIZES).index("body.A"), list(SIZES).index("body.G"))


def step(factors):
    found = factors.power_iteration_(tol=1e-4, max_iter=300)
    return found, *kfac_ext.damped_inverse_ex([factors[key] for key in SIZES], 0.01, pi=[PAIR])


def test_native_kernels_serve():
    factors, _ = filled()
    step(factors)
    kfac_ext.obs_saliency(*layers())
    checks = kfac_ext.build_info()["cuda_checks"]
    assert [checks[f"{name} on cuda:0"] for name in ("power_iteration", "damped_inverse", "saliency")] == ["ok"] * 3


def test_against_float64():
    factors, exact = filled()
    found, inverses, info = step(factors)
    wanted = reference.power_iteration(exact, tol=1e-4, max_iter=300)
    assert relative_error(found.eigenvalues, wanted.eigenvalues) < 1e-6
    assert (found.residuals <= 1e-4).all() and not info.any()
    for key, inverse, wanted_inverse in zip(SIZES, inverses, reference.damped_inverse(exact, 0.01, pi=[PAIR])):
        assert relative_error(inverse, wanted_inverse) < 1e-4, key
        assert torch.equal(inverse, inverse.mT), key


def test_no_step_waits_for_the_device(request):
    factors, _ = filled()
    step(factors)
    weights, As, Gs, blocks = layers()
    kfac_ext.obd_saliency(weights, As, Gs, blocks)
    request.getfixturevalue("no_waiting")
    step(factors)
    kfac_ext.obd_saliency(weights, As, Gs, blocks)


def test_twice_the_same_bits():
    (first, _), (second, _) = filled(), filled()
    (a, a_inverses, _), (b, b_inverses, _) = step(first), step(second)
    assert torch.equal(a.eigenvalues, b.eigenvalues) and torch.equal(first.vectors, second.vectors)
    assert all(torch.equal(x, y) for x, y in zip(a_inverses, b_inverses))


def test_a_graph_replays_a_step():
    factors, _ = filled()
    step(factors)  # warm-up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found, inverses, info = step(factors)
    factors.buffer.mul_(2)
    graph.replay()
    wanted, exact_inverses, _ = step(factors)
    assert torch.allclose(found.eigenvalues, wanted.eigenvalues, rtol=1e-6)
    assert all(torch.equal(x, y) for x, y in zip(inverses, exact_inverses)) and not info.any()


def whole_step(factors, inputs):
    """Accumulate, power iteration, inverses, the matrix-free form."""
    x, g, rows = inputs
    kinds, blend = CovarianceUpdate, {"decay": 0.5, "scale": 0.5}
    factors.accumulate_(
        [
            kinds.conv2d("body.A", x, 3, padding=1, bias=True, **blend),
            kinds.gradient("body.G", g, **blend),
            kinds.linear("wide.A", rows, **blend),
        ]
    )
    found = factors.power_iteration_(tol=1e-4, max_iter=300)
    inverses, info = factors.damped_inverse(0.01)
    listed, _ = kfac_ext.damped_inverse_ex([factors["body.A"], factors["body.G"]], [0.01, 0.02])
    free = kfac_ext.covariance_power_iteration(x, 3, padding=1, bias=True, tol=1e-4, max_iter=300)
    return found.eigenvalues, inverses.buffer, info, *listed, free.eigenvalues


def step_inputs(seed, device="cuda"):
    generator = torch.Generator(device).manual_seed(seed)
    shapes = [(16, 64, 12, 12), (16, 128, 12, 12), (200, 1153)]
    return [torch.randn(shape, device=device, generator=generator) + 0.1 for shape in shapes]


def test_a_graph_replays_the_whole_step():
    factors, _ = filled()
    inputs = step_inputs(0)
    whole_step(factors, inputs)  # warm-up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = whole_step(factors, inputs)
    other, _ = filled()
    factors.buffer.copy_(other.buffer)
    factors.vectors.copy_(other.vectors)
    for value, new in zip(inputs, step_inputs(1)):
        value.copy_(new)
    graph.replay()
    wanted = whole_step(other, step_inputs(1))
    assert torch.equal(factors.buffer, other.buffer) and torch.equal(factors.vectors, other.vectors)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))


def test_a_second_step_neither_waits_nor_asks_for_memory(request):
    factors, _ = filled()
    inputs = step_inputs(0)
    whole_step(factors, inputs)
    whole_step(factors, inputs)
    before = torch.cuda.memory_reserved()
    request.getfixturevalue("no_waiting")
    whole_step(factors, inputs)
    assert torch.cuda.memory_reserved() == before


def test_memory_that_nothing_has_written_is_not_read(poisoned):
    factors, _ = filled()
    assert all(value.isfinite().all() for value in whole_step(factors, step_inputs(0)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_the_second_device():
    first, _ = filled()
    second = FactorSet(SIZES, device="cuda:1")
    second.load_state_dict(first.state_dict())
    wanted = whole_step(first, step_inputs(0))
    found = whole_step(second, [value.to("cuda:1") for value in step_inputs(0)])
    assert torch.cuda.current_device() == 0
    assert all(value.device == torch.device("cuda", 1) for value in found)
    assert all(torch.allclose(a.cuda(0), b, rtol=1e-5) for a, b in zip(found, wanted))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matrix_free_iteration(layout, dtype):
    x = step_inputs(0)[0].to(dtype).contiguous(memory_format=layout)
    first, second = (kfac_ext.covariance_power_iteration(x, 3, padding=1, bias=True, tol=1e-4) for _ in range(2))
    wanted = reference.covariance_power_iteration(x.double(), 3, padding=1, bias=True, tol=1e-4)
    assert relative_error(first.eigenvalues, wanted.eigenvalues) < 1e-6
    assert torch.equal(first.eigenvectors[0], second.eigenvectors[0])
    assert kfac_ext.build_info()["cuda_checks"]["covariance_power_iteration on cuda:0"] == "ok"


def test_compiles_without_graph_breaks():
    """Inputs in bf16, as a network's hooks see them under AMP."""
    factors, _ = filled()
    x = step_inputs(0)[0].bfloat16()

    def step(x):
        factors.accumulate_([CovarianceUpdate.conv2d("body.A", x, 3, padding=1, bias=True)])
        return factors.power_iteration_().eigenvalues, kfac_ext.covariance_power_iteration(x, 3, padding=1).eigenvalues

    wanted = [value.clone() for value in step(x)]
    torch._dynamo.reset()
    found = torch.compile(step, backend="aot_eager", fullgraph=True)(x)
    assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(found, wanted))


def test_kernels_run_on_the_current_stream():
    factors, _ = filled()
    step(factors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        factors.buffer.mul_(4)
        found, _, _ = step(factors)
    stream.synchronize()
    wanted = reference.power_iteration([factors[key].double() for key in SIZES], tol=1e-4, max_iter=300)
    assert relative_error(found.eigenvalues, wanted.eigenvalues) < 1e-6


def test_what_fails_in_float32_is_inverted_in_float64():
    rows = torch.randn(5, 200, dtype=torch.float64, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    matrix = (rows.mT @ rows).float()
    damping = 1e-7 - float(torch.linalg.eigvalsh(matrix.double())[0])
    _, info = kfac_ext.damped_inverse_ex([matrix, -matrix], damping)
    assert (info > 0).all()
    wanted = torch.linalg.inv(matrix.double() + damping * torch.eye(200, dtype=torch.float64, device="cuda"))
    assert relative_error(kfac_ext.damped_inverse([matrix], damping)[0], wanted) < 1e-4
    with pytest.raises(torch.linalg.LinAlgError, match=r"matrices \[0\]"):
        kfac_ext.damped_inverse([-matrix], damping)


def test_teams_of_blocks_do_not_wait_for_ever():
    """Many calls beside other kernels that keep the device busy."""
    factors, _ = filled()
    busy = torch.cuda.Stream()
    with torch.cuda.stream(busy):
        x = torch.randn(2048, 2048, device="cuda")
        for _ in range(300):
            x = x @ x / 50
    for _ in range(300):
        factors.power_iteration_(tol=0.0, max_iter=5)
    torch.cuda.synchronize()
    assert factors.eigenvalues.isfinite().all()
