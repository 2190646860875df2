import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kfac_ext
from kfac_ext import reference
from kfac_ext.ops import saliency
from tests.ops.factor_lists import spd

pytestmark = pytest.mark.usefixtures("poisoned")


def layer(outputs, neurons, block, bias=0, dtype=torch.float32, seed=0, device="cpu"):
    """V, A, G, H, block of a layer that `neurons` neurons feed."""
    d = neurons * block + bias
    generator = torch.Generator().manual_seed(seed)
    V = torch.randn(outputs, d, generator=generator, dtype=torch.float64).to(device, dtype)
    A, G = spd(d, dtype, seed=seed, device=device), spd(outputs, dtype, seed=seed + 1, device=device)
    return V, A, G, kfac_ext.damped_inverse([A], 0.01)[0], block


def oracle(V, matrix, G, block, obs):
    """The scores, one neuron at a time, in float64."""
    V, matrix, G = V.double().cpu(), matrix.double().cpu(), G.double().cpu()
    scores = []
    for j in range(V.shape[1] // block):
        J = slice(j * block, (j + 1) * block)
        middle = torch.linalg.inv(matrix[J, J]) if obs else matrix[J, J]
        scores.append(0.5 * torch.trace(V[:, J].T @ G @ V[:, J] @ middle))
    return torch.stack(scores)


def worst(value, exact):
    return float(((value.double().cpu() - exact).abs() / exact).max())


LAYERS = [
    (1, 1, 1, 0),
    (10, 20, 1, 1),
    (2, 2, 9, 0),
    (15, 16, 1, 0),
    (16, 17, 9, 1),
    (17, 31, 9, 0),
    (33, 5, 25, 0),
    (10, 3, 64, 1),
    (64, 64, 9, 0),
    (129, 300, 1, 1),
    (300, 15, 4, 0),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("obs", [False, True])
@pytest.mark.parametrize("shape", LAYERS)
def test_scores(device, threads, dtype, obs, shape):
    V, A, G, H, block = layer(*shape, dtype=dtype, device=device)
    matrix, name = (H, "obs_saliency") if obs else (A, "obd_saliency")
    exact = oracle(V, matrix, G, block, obs)
    (scores,) = getattr(kfac_ext, name)([V], [matrix], [G], [block])
    (plain,) = getattr(reference, name)([V], [matrix], [G], [block])
    assert scores.dtype == dtype and scores.shape == (shape[1] + (shape[3] if block == 1 else 0),)
    assert worst(scores, exact) <= (1e-11 if dtype == torch.float64 else max(2 * worst(plain, exact), 2.4e-7))


def test_a_list_of_layers(device, threads):
    layers = [layer(*shape, dtype=torch.float64, seed=i, device=device) for i, shape in enumerate(LAYERS)]
    V, A, G, H, blocks = (list(column) for column in zip(*layers))
    for i, scores in enumerate(kfac_ext.obd_saliency(V, A, G, blocks)):
        assert worst(scores, oracle(V[i], A[i], G[i], blocks[i], False)) < 1e-11
    for i, scores in enumerate(kfac_ext.obs_saliency(V, H, G, blocks)):
        assert worst(scores, oracle(V[i], H[i], G[i], blocks[i], True)) < 1e-11


def test_obs_score_is_the_change_that_compensation_leaves(device):
    """1/2 tr(dW^T G dW (A + D)) of the best change dW that silences neuron j."""
    V, A, G, _, block = layer(12, 6, 4, dtype=torch.float64, device=device)
    damped = A + 0.1 * torch.eye(24, dtype=torch.float64, device=device)
    (H,) = kfac_ext.damped_inverse([A], 0.1)
    (scores,) = kfac_ext.obs_saliency([V], [H], [G], [block])
    for j in range(6):
        pruned = torch.arange(j * block, (j + 1) * block, device=device)
        kept = torch.tensor([c for c in range(24) if c not in pruned.tolist()], device=device)
        change = -V.clone()
        change[:, kept] += kfac_ext.compensate([V], [H], [pruned])[0]
        assert float(scores[j]) == pytest.approx(float(0.5 * torch.trace(change.T @ G @ change @ damped)), rel=1e-10)


@pytest.mark.parametrize("native", [True, False])
def test_obs_names_the_block_that_is_not_positive_definite(device, native):
    V, _, G, H, block = layer(5, 40, 2, device=device)
    bad = H.clone()
    bad[2 * 33 + 1, 2 * 33 + 1] = -1
    bad[2 * 35, 2 * 35] = math.nan
    message = r"^obs_saliency: the block of neuron 33 in inverses\[1\] is not positive definite"
    with kfac_ext.use_native(native), pytest.raises(torch.linalg.LinAlgError, match=message):
        kfac_ext.obs_saliency([V, V], [H, bad], [G, G], [block, block])


def test_weights_that_are_not_finite_show_in_their_scores_only(device):
    V, A, G, H, block = layer(5, 20, 3, device=device)
    V[2, 3 * 7 + 1] = math.nan
    for scores in (kfac_ext.obd_saliency([V], [A], [G], [block]), kfac_ext.obs_saliency([V], [H], [G], [block])):
        assert scores[0].isnan().nonzero().flatten().tolist() == [7]


def test_any_strides(device):
    V, A, G, H, block = layer(9, 8, 3, dtype=torch.float64, device=device)
    apart = torch.full((18, 48), math.nan, device=device, dtype=torch.float64)
    seen = apart[::2, ::2].copy_(V), A.T, G.T
    exact = oracle(V, A, G, block, False)
    assert worst(kfac_ext.obd_saliency(*([t] for t in seen), [block])[0], exact) < 1e-12
    pruned = torch.arange(0, 24, device=device)[::2]
    assert torch.allclose(
        kfac_ext.compensate([seen[0]], [H.T], [pruned])[0], reference.compensate([V], [H], [pruned])[0]
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 3, 9]), st.booleans(), st.integers(0, 99))
def test_random_layers(outputs, neurons, block, bias, seed):
    V, A, G, H, _ = layer(outputs, neurons, block, int(bias), torch.float64, seed)
    assert worst(kfac_ext.obd_saliency([V], [A], [G], [block])[0], oracle(V, A, G, block, False)) < 1e-10
    assert worst(kfac_ext.obs_saliency([V], [H], [G], [block])[0], oracle(V, H, G, block, True)) < 1e-10
    pruned = torch.randperm(V.shape[1], generator=torch.Generator().manual_seed(seed))[: seed % V.shape[1]]
    difference = kfac_ext.compensate([V], [H], [pruned])[0] - reference.compensate([V], [H], [pruned])[0]
    assert float(difference.norm()) <= 1e-10 * float(V.norm())


# ---- compensation ----


@pytest.fixture(params=["kernel", "grouped"])
def way(request, monkeypatch):
    """What serves CPU tensors: their kernel, or what is for GPUs."""
    if request.param == "grouped":
        monkeypatch.setattr(saliency, "_compensate_cpu", saliency._compensate_grouped)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "outputs, columns, removed", [(1, 2, 1), (10, 33, 16), (33, 129, 17), (20, 300, 299), (64, 577, 290)]
)
def test_compensate(device, threads, dtype, outputs, columns, removed):
    W, _, _, H, _ = layer(outputs, columns, 1, dtype=dtype, device=device)
    pruned = torch.randperm(columns, generator=torch.Generator().manual_seed(1))[:removed].to(device)
    (native,), (plain,) = kfac_ext.compensate([W], [H], [pruned]), reference.compensate([W], [H], [pruned])
    (exact,) = reference.compensate([W.double()], [H.double()], [pruned])
    error = (native.double() - exact).norm() / exact.norm()
    allowed = 4 * (plain.double() - exact).norm() / exact.norm()
    assert float(error) <= (1e-10 if dtype == torch.float64 else max(float(allowed), 5e-7))


@pytest.mark.usefixtures("way")
def test_compensation_solves_the_least_squares_problem(device):
    """It equals W_K + W_J A_JK (A_KK + D)^-1, the best the survivors can do."""
    W, A, _, H, _ = layer(7, 30, 1, dtype=torch.float64, device=device)
    pruned, kept = torch.arange(5, device=device), torch.arange(5, 30, device=device)
    damped = A + 0.01 * torch.eye(30, device=device, dtype=torch.float64)
    expected = W[:, kept] + W[:, pruned] @ damped[pruned][:, kept] @ torch.linalg.inv(damped[kept][:, kept])
    assert torch.allclose(kfac_ext.compensate([W], [H], [pruned])[0], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("native", [True, False])
def test_nothing_and_everything_pruned(device, native):
    W, _, _, H, _ = layer(7, 20, 1, device=device)
    none, every = torch.arange(0, device=device), torch.arange(20, device=device)
    with kfac_ext.use_native(native):
        same, empty = kfac_ext.compensate([W, W], [H, H], [none, every])
    assert torch.equal(same, W) and same.data_ptr() != W.data_ptr()
    assert empty.shape == (7, 0)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("native", [True, False])
def test_compensate_names_the_layer_that_has_no_solution(device, native):
    W, _, _, H, _ = layer(7, 20, 1, device=device)
    bad = H.clone()
    bad[3, 3] = -1
    pruned = torch.arange(5, device=device)
    message = r"^compensate: inverses\[1\] at the columns pruned\[1\] is not positive definite"
    with kfac_ext.use_native(native), pytest.raises(torch.linalg.LinAlgError, match=message):
        kfac_ext.compensate([W, W], [H, bad], [pruned, pruned])


def test_empty_lists():
    assert kfac_ext.obd_saliency([], [], [], []) == []
    assert kfac_ext.obs_saliency([], [], [], []) == []
    assert kfac_ext.compensate([], [], []) == []


# ---- bad calls ----

V, A, G = torch.ones(3, 4), torch.eye(4), torch.eye(3)
BAD_SCORES = {
    "tensor": (TypeError, r"weights\[0\] is a int, expected a tensor", ([1], [A], [G], [1])),
    "count": (ValueError, "As has 2 entries, expected 1: one for each of weights", ([V], [A, A], [G], [1])),
    "blocks": (ValueError, "blocks has 0 entries, expected 1", ([V], [A], [G], [])),
    "matrix": (ValueError, r"weights\[0\] has 3 dimensions", ([V[None]], [A], [G], [1])),
    "A": (ValueError, r"As\[0\] has shape \(3, 3\), expected \(4, 4\)", ([V], [G], [G], [1])),
    "G": (ValueError, r"Gs\[1\] has shape \(4, 4\), expected \(3, 3\)", ([V, V], [A, A], [G, A], [1, 1])),
    "dtype": (
        TypeError,
        r"Gs\[0\] has dtype torch.float64, the first matrix torch.float32",
        ([V], [A], [G.double()], [1]),
    ),
    "half": (TypeError, r"weights\[0\] has dtype torch.float16", ([V.half()], [A.half()], [G.half()], [1])),
    "empty": (ValueError, r"weights\[0\] is empty", ([V[:0]], [A], [G], [1])),
    "block": (ValueError, r"blocks\[0\] is 0, expected a divisor of the 4 columns", ([V], [A], [G], [0])),
    "divisor": (ValueError, r"blocks\[0\] is 5, expected a divisor", ([V], [A], [G], [5])),
    "left over": (
        ValueError,
        r"blocks\[0\] is 3, expected a divisor of the 5 columns of weights\[0\] \(or of all but the last, the bias\)",
        ([torch.ones(3, 5)], [torch.eye(5)], [G], [3]),
    ),
}


@pytest.mark.parametrize("name", BAD_SCORES)
@pytest.mark.parametrize("native", [True, False])
def test_bad_scores(name, native):
    error, message, arguments = BAD_SCORES[name]
    with kfac_ext.use_native(native):
        with pytest.raises(error, match=f"^obd_saliency: {message}"):
            kfac_ext.obd_saliency(*arguments)
        with pytest.raises(error, match=f"^obs_saliency: {message.replace('As', 'inverses')}"):
            kfac_ext.obs_saliency(*arguments)


BAD_COMPENSATIONS = {
    "dtype": (TypeError, r"pruned\[0\] has dtype torch.bool and shape \(4,\), expected int64", torch.ones(4).bool()),
    "shape": (TypeError, r"pruned\[0\] has dtype torch.int64 and shape \(1, 1\)", torch.zeros(1, 1).long()),
    "range": (ValueError, r"pruned\[0\] has indices from 1 to 4, expected columns 0 to 3", torch.tensor([1, 4])),
    "negative": (ValueError, r"pruned\[0\] has indices from -1 to 0, expected columns 0 to 3", torch.tensor([0, -1])),
    "twice": (ValueError, r"pruned\[0\] names a column twice", torch.tensor([2, 2])),
    "too many": (ValueError, r"pruned\[0\] has 5 indices of 4 columns", torch.arange(5)),
    "device": (ValueError, r"pruned\[0\] is on meta", torch.zeros(1, device="meta").long()),
}


@pytest.mark.parametrize("name", BAD_COMPENSATIONS)
@pytest.mark.parametrize("native", [True, False])
def test_bad_compensations(name, native):
    error, message, pruned = BAD_COMPENSATIONS[name]
    with kfac_ext.use_native(native), pytest.raises(error, match=f"^compensate: {message}"):
        kfac_ext.compensate([V], [A], [pruned])


# ---- operators ----


@pytest.mark.parametrize("obs", [False, True])
def test_opcheck_scores(obs):
    layers = [layer(5, 4, 3), layer(18, 20, 1, 1)]
    weights, As, Gs, Hs, blocks = (list(column) for column in zip(*layers))
    torch.library.opcheck(torch.ops.kfac_ext.saliency.default, (weights, Hs if obs else As, Gs, blocks, obs))


def test_opcheck_compensate():
    W, _, _, H, _ = layer(5, 4, 3)
    torch.library.opcheck(torch.ops.kfac_ext.compensate.default, ([W], [H], [torch.tensor([7, 2])]))


def test_the_reference_serves_when_native_is_off(monkeypatch):
    monkeypatch.delattr(kfac_ext._C, "saliency_cpu")
    monkeypatch.delattr(kfac_ext._C, "compensate_cpu")
    pruned = [torch.tensor([1])]
    with kfac_ext.use_native(False):
        assert torch.equal(kfac_ext.obs_saliency([V], [A], [G], [1])[0], torch.full((4,), 1.5))
        assert torch.equal(kfac_ext.compensate([V], [A], pruned)[0], V[:, 1:])
    with pytest.raises(AttributeError):
        kfac_ext.compensate([V], [A], pruned)
