import io

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kfac_ext
from kfac_ext import CovarianceUpdate, FactorSet

SIZES = {"conv.A": 28, "conv.G": 16, "depthwise.A": (5, 9), "fc.A": 17}


@pytest.fixture
def factors():
    result = FactorSet(SIZES, dtype=torch.float64)
    for key in result:
        matrix = result[key]
        root = torch.randn(matrix.shape, dtype=torch.float64)
        matrix.copy_(root @ root.mT)
    return result


def test_everything_lies_in_one_buffer_of_aligned_slots(factors):
    for key, size in SIZES.items():
        expected = (size[0], size[1], size[1]) if isinstance(size, tuple) else (size, size)
        view = factors[key]
        assert view.shape == expected and view.is_contiguous()
        assert view.untyped_storage().data_ptr() == factors.buffer.untyped_storage().data_ptr()
        assert (view.data_ptr() - factors.buffer.data_ptr()) % 64 == 0
    factors.buffer.zero_()
    assert not factors["fc.A"].any()


def test_operations_write_into_the_views(factors):
    x = torch.randn(9, 17, dtype=torch.float64)
    kfac_ext.linear_covariance_(factors["fc.A"], x)
    assert torch.equal(factors["fc.A"], kfac_ext.linear_covariance(x))


def test_power_iteration_finds_every_dominant_eigenpair(factors):
    factors.power_iteration_(tol=1e-9, max_iter=10_000)
    for key in factors:
        exact = torch.linalg.eigvalsh(factors[key])[..., -1]
        torch.testing.assert_close(factors.eigenvalue(key), exact)
        vector = factors.vector(key)[..., None]
        torch.testing.assert_close((factors[key] @ vector), exact[..., None, None] * vector, rtol=1e-5, atol=1e-5)


def test_power_iteration_of_some_factors_leaves_the_others(factors):
    factors.power_iteration_(["fc.A", "depthwise.A"])
    assert factors.eigenvalue("fc.A") > 0 and bool((factors.eigenvalue("depthwise.A") > 0).all())
    assert factors.eigenvalue("conv.A") == 0


def test_damped_inverse(factors):
    inverse, info = factors.damped_inverse(0.1)
    assert not info.any() and len(info) == 8
    for key in factors:
        n = factors[key].shape[-1]
        exact = torch.linalg.inv(factors[key] + 0.1 * torch.eye(n, dtype=torch.float64))
        torch.testing.assert_close(inverse[key], exact)


def test_pi_corrected_damping(factors):
    inverse, _ = factors.damped_inverse(0.04, ["conv.A", "conv.G"], pi=[("conv.A", "conv.G")])
    pi = (factors["conv.A"].diagonal().mean() / factors["conv.G"].diagonal().mean()).sqrt()
    exact = torch.linalg.inv(factors["conv.A"] + 0.2 * pi * torch.eye(28, dtype=torch.float64))
    torch.testing.assert_close(inverse["conv.A"], exact)
    with pytest.raises(ValueError, match=r"'depthwise\.A' of 5 groups with 'conv\.G' of 1"):
        factors.damped_inverse(0.1, ["depthwise.A", "conv.G"], pi=[("depthwise.A", "conv.G")])


def test_pi_corrected_damping_of_groups():
    random = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    factors = FactorSet({"fc.A": 4, "dw.A": (3, 4), "dw.G": (3, 4)}, dtype=torch.float64)
    factors["dw.A"].copy_(random[0] @ random[0].mT)
    factors["dw.G"].copy_(5 * random[1] @ random[1].mT)
    inverse, _ = factors.damped_inverse(0.04, pi=[("dw.A", "dw.G")])
    for group in range(3):
        A, G = factors["dw.A"][group], factors["dw.G"][group]
        pi = (A.trace() / G.trace()).sqrt()
        for key, matrix, amount in (("dw.A", A, 0.2 * pi), ("dw.G", G, 0.2 / pi)):
            exact = torch.linalg.inv(matrix + amount * torch.eye(4, dtype=torch.float64))
            torch.testing.assert_close(inverse[key][group], exact)


def test_a_set_of_given_matrices():
    matrices = {"fc.A": torch.eye(3, dtype=torch.float64), "dw.A": torch.ones(2, 2, 2, dtype=torch.float64)}
    factors = FactorSet.of(matrices)
    assert factors.sizes == {"fc.A": 3, "dw.A": (2, 2)} and factors.buffer.dtype == torch.float64
    assert all(torch.equal(factors[key], matrix) for key, matrix in matrices.items())


def test_narrowed_keeps_rows_columns_and_eigenvectors(factors):
    factors.power_iteration_()
    keep, groups = torch.tensor([3, 0, 5]), torch.tensor([1, 4])
    small = factors.narrowed({"fc.A": keep}, {"depthwise.A": groups})
    assert small.sizes == {**SIZES, "fc.A": 3, "depthwise.A": (2, 9)}
    assert torch.equal(small["fc.A"], factors["fc.A"][keep][:, keep])
    assert torch.equal(small["depthwise.A"], factors["depthwise.A"][groups])
    assert torch.equal(small["conv.A"], factors["conv.A"])
    expected = torch.nn.functional.normalize(factors.vector("fc.A")[keep], dim=0)
    torch.testing.assert_close(small.vector("fc.A"), expected)
    with pytest.raises(KeyError, match=r"no\.A"):
        factors.narrowed({"no.A": keep})


def test_state_dict_round_trip(factors):
    factors.power_iteration_()
    file = io.BytesIO()
    torch.save(factors.state_dict(), file)
    file.seek(0)
    other = FactorSet(SIZES, dtype=torch.float64)
    other.load_state_dict(torch.load(file, weights_only=True))
    for name in ("buffer", "vectors", "eigenvalues"):
        assert torch.equal(getattr(other, name), getattr(factors, name))


def test_a_state_in_another_order_and_another_dtype_is_loaded(factors):
    factors.power_iteration_()
    other = FactorSet(dict(reversed(SIZES.items())), dtype=torch.float32)
    other.load_state_dict(factors.state_dict())
    for key in SIZES:
        assert torch.equal(other[key], factors[key].float())
        assert torch.equal(other.vector(key), factors.vector(key).float())
        assert torch.equal(other.eigenvalue(key), factors.eigenvalue(key).float())


def test_a_state_of_other_sizes_is_refused(factors):
    other = FactorSet({**SIZES, "fc.A": 16}, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"'fc.A' has size 17 in the state, expected 16"):
        other.load_state_dict(factors.state_dict())
    assert not other.buffer.any()


@pytest.mark.parametrize("sizes", [{"a": 0}, {"a": (0, 3)}, {"a": -1}, {"a": 2.5}, {"a": "3"}, {"a": (2, 3, 4)}])
def test_bad_sizes(sizes):
    with pytest.raises(ValueError, match="factor 'a' has size"):
        FactorSet(sizes)


def test_bad_dtype():
    with pytest.raises(ValueError, match=r"dtype is torch\.float16"):
        FactorSet({"a": 3}, dtype=torch.float16)


# ---- inside of compiled code ----


def test_a_whole_step_compiles_without_graph_breaks():
    def step(factors, x, g):
        kinds = CovarianceUpdate
        factors.accumulate_(
            [
                kinds.conv2d("c.A", x, 3, padding=1, bias=True, decay=0.9),
                kinds.gradient("c.G", g, mode="reduce", decay=0.9),
            ]
        )
        inverses, info = kfac_ext.damped_inverse_ex([factors[key] for key in factors], 0.1)
        return factors.power_iteration_().eigenvalues * 2, inverses[0] + 1, info

    x, g = torch.randn(2, 3, 5, 5), torch.randn(2, 4, 5, 5)
    factors, plain = FactorSet({"c.A": 28, "c.G": 4}), FactorSet({"c.A": 28, "c.G": 4})
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, g: step(factors, x, g), backend="aot_eager", fullgraph=True)
    for _ in range(2):
        found, wanted = compiled(x, g), step(plain, x, g)
        assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(found, wanted))
    assert torch.allclose(factors.buffer, plain.buffer) and torch.allclose(factors.vectors, plain.vectors, atol=1e-5)


def test_operators_keep_the_device_of_their_inputs():
    """Shapes and devices as a compiler sees them, on a machine without that device."""
    with FakeTensorMode():
        x, A = torch.empty(4, 3, 8, 8, device="cuda:1"), torch.empty(5, 5, device="cuda:1")
        index = torch.empty(2, dtype=torch.int64, device="cuda:1")
        found = [
            kfac_ext.conv2d_covariance(x, 3, padding=1),
            kfac_ext.linear_covariance(A),
            kfac_ext.gradient_covariance(x),
            *kfac_ext.damped_inverse([A], 0.1),
            *kfac_ext.power_iteration([A])[:1],
            *kfac_ext.covariance_power_iteration(x, 3)[:1],
            *kfac_ext.obd_saliency([A], [A], [A], [1]),
            *kfac_ext.obs_saliency([A], [A], [A], [1]),
            *kfac_ext.compensate([A], [A], [index]),
        ]
        assert all(value.device == torch.device("cuda", 1) for value in found)
