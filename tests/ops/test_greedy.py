from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kfac_ext
from kfac_ext import reference
from kfac_ext.ops import greedy
from tests.ops.factor_lists import spd

pytestmark = pytest.mark.usefixtures("poisoned")


def layer(outputs, neurons, block, bias=0, dtype=torch.float64, seed=0, device="cpu", damping=0.01):
    """V, H, G and the columns, of a layer that `neurons` neurons feed in shuffled columns."""
    d = neurons * block + bias
    generator = torch.Generator().manual_seed(seed)
    V = torch.randn(outputs, d, generator=generator, dtype=torch.float64).to(device, dtype)
    A, G = spd(d, dtype, seed=seed, device=device), spd(outputs, dtype, seed=seed + 1, device=device)
    order = torch.randperm(d, generator=generator)[: neurons * block].to(device) if seed % 2 else torch.arange(d)
    columns = order[: neurons * block].view(neurons, block).to(device)
    return V, kfac_ext.damped_inverse([A], damping)[0], G, columns


def layers_of(*shapes, **options):
    return [list(column) for column in zip(*(layer(*shape, seed=i, **options) for i, shape in enumerate(shapes)))]


def joint_change(V, H, G, columns):
    """1/2 tr(V_S^T G V_S (H_SS)^-1) of all these columns together."""
    return 0.5 * torch.linalg.solve(H[columns][:, columns], V[:, columns].T @ G @ V[:, columns]).trace()


SHAPES = [
    [(1, 1, 1)],
    [(10, 33, 1, 1)],
    [(7, 31, 1), (129, 31, 1, 1)],
    [(20, 16, 9)],
    [(17, 17, 9, 1), (5, 17, 1)],
    [(3, 5, 25)],
    [(12, 6, 64, 1)],
    [(40, 129, 2), (3, 129, 3, 1), (9, 129, 1)],
]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_the_direct_algorithm_chooses_the_same(device, threads, native, shapes):
    Vs, Hs, Gs, columns = layers_of(*shapes, device=device)
    count = len(columns[0]) * 3 // 4 + 1
    kept = [H.clone() for H in Hs]
    with kfac_ext.use_native(native):
        found = kfac_ext.greedy_selection(Vs, Hs, Gs, columns, count)
    neurons, scores, weights = reference.greedy_selection(Vs, Hs, Gs, columns, count)
    assert found.neurons.tolist() == neurons.tolist()
    torch.testing.assert_close(found.scores, scores, rtol=1e-9, atol=1e-12)
    for now, expected, H, before in zip(found.weights, weights, Hs, kept):
        torch.testing.assert_close(now, expected, rtol=1e-9, atol=1e-10)
        assert torch.equal(H, before)


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_float32_loses_as_much(device, shapes):
    Vs, Hs, Gs, columns = layers_of(*shapes, device=device)
    count = len(columns[0]) // 2
    exact = reference.greedy_selection(Vs, Hs, Gs, columns, count)[1].sum()
    single = [[matrix.float() for matrix in matrices] for matrices in (Vs, Hs, Gs)]
    found = kfac_ext.greedy_selection(*single, columns, count)
    assert found.weights[0].dtype == torch.float32
    assert float(found.scores.sum()) == pytest.approx(float(exact), rel=1e-3)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 24),
    st.lists(st.tuples(st.integers(1, 30), st.sampled_from([1, 2, 3, 9]), st.booleans()), min_size=1, max_size=3),
    st.integers(0, 99),
)
def test_random_problems(neurons, consumers, seed):
    Vs, Hs, Gs, columns = map(
        list, zip(*(layer(out, neurons, b, int(bias), seed=seed + i) for i, (out, b, bias) in enumerate(consumers)))
    )
    count = 1 + seed % neurons
    found = kfac_ext.greedy_selection(Vs, Hs, Gs, columns, count)
    expected = reference.greedy_selection(Vs, Hs, Gs, columns, count)
    assert found.neurons.tolist() == expected[0].tolist()
    torch.testing.assert_close(found.scores, expected[1], rtol=1e-8, atol=1e-11)


def test_total_and_weights_are_those_of_one_removal(device):
    """Removals of one, several and many columns, at once and after one another, in lists of blocks of their own."""
    V, H, G, columns = layer(9, 40, 4, 1, device=device)
    lists = [columns[:25], columns[25:].reshape(30, 2)]
    selection = kfac_ext.GreedySelection([V], [H], [G], lists, [0, 0])
    gone = []
    for step in ({0: [3]}, {0: [1, 7], 1: [5, 2]}, {1: torch.arange(8, 28)}, {0: [0]}, {}, {0: [2, 24]}):
        selection.remove_(step)
        gone += [listed for number, index in step.items() for listed in lists[number][index].flatten().tolist()]
        assert selection.total == pytest.approx(float(joint_change(V, H, G, gone)), rel=1e-9)
        for listed, scores in zip(lists, selection.scores):
            for neuron, score in zip(listed.tolist(), scores.tolist()):
                if neuron[0] in gone:
                    assert score == math.inf
                else:
                    alone = float(joint_change(V, H, G, gone + neuron)) - selection.total
                    assert score == pytest.approx(alone, rel=1e-6)
    kept = torch.tensor([c for c in range(161) if c not in gone], device=device)
    (now,) = selection.weights()
    torch.testing.assert_close(now[:, kept], reference.compensate([V], [H], [torch.tensor(gone, device=device)])[0])
    assert not now[:, gone].any()


def test_a_change_is_told_before_anything_goes(device):
    """Of one neuron its score; of several, in lists of two layers, what their removal then loses."""
    V, H, G, columns = layer(9, 40, 4, 1, device=device)
    selection = kfac_ext.GreedySelection([V, 2 * V], [H, H], [G, G], [columns, columns])
    for step in ({0: [3], 1: [3]}, {0: list(range(5, 25)), 1: [7]}, {1: torch.tensor([20, 31])}, {0: []}):
        first = {number: float(selection.scores[number][30]) for number in (0, 1)}
        assert all(selection.change({number: [30]}) == pytest.approx(score) for number, score in first.items())
        told, before = selection.change(step), selection.total
        assert selection.total == before and selection.remove_(step) == pytest.approx(told, rel=1e-9, abs=1e-12)


def test_overwriting_works_in_the_memory_that_is_given(device):
    V, H, G, columns = layer(9, 12, 3, device=device)
    expected = kfac_ext.greedy_selection([V], [H], [G], [columns], 5)
    before, weight = H.clone(), V.clone()
    selection = kfac_ext.GreedySelection([V], [H], [G], [columns], overwrite=True)
    for neuron in expected.neurons.tolist():
        selection.remove_({0: [neuron]})
    assert not torch.equal(H, before) and torch.equal(V, weight)
    assert torch.equal(selection.weights()[0], expected.weights[0])


def test_any_strides(device):
    V, H, G, columns = layer(9, 8, 3, device=device)
    apart = torch.full((18, 48), math.nan, device=device, dtype=torch.float64)
    seen = apart[::2, ::2].copy_(V)
    found = kfac_ext.greedy_selection([seen], [H.T], [G.T], [columns.T.contiguous().T], 4)
    expected = kfac_ext.greedy_selection([V], [H], [G], [columns], 4)
    assert torch.equal(found.neurons, expected.neurons)
    torch.testing.assert_close(found.scores, expected.scores)


# ---- nearly singular ----


def test_dead_inputs_go_first_and_for_nothing(device):
    V, _, G, columns = layer(6, 10, 2, device=device)
    A = spd(20, torch.float64, device=device)
    dead = columns[[4, 8]].flatten()
    A[dead], A[:, dead] = 0.0, 0.0
    V[:, dead] = 0.0
    for dtype in (torch.float32, torch.float64):
        (H,) = kfac_ext.damped_inverse([A.to(dtype)], 1e-6)
        found = kfac_ext.greedy_selection([V.to(dtype)], [H], [G.to(dtype)], [columns], 9)
        assert sorted(found.neurons[:2].tolist()) == [4, 8] and found.scores[:2].tolist() == [0.0, 0.0]
        assert bool(found.scores.isfinite().all()) and bool(found.weights[0].isfinite().all())


@pytest.mark.parametrize("damping", [1e-2, 1e-7])
def test_of_equal_neurons_one_is_free(device, damping):
    V, _, G, columns = layer(6, 8, 2, seed=2, device=device)
    rows = torch.randn(200, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    twice = torch.cat([rows, rows], dim=1)
    (H,) = kfac_ext.damped_inverse([twice.mT @ twice / 200], damping)
    expected = reference.greedy_selection([V], [H], [G], [columns], 7)
    for native in (True, False):
        with kfac_ext.use_native(native):
            found = kfac_ext.greedy_selection([V], [H], [G], [columns], 7)
        assert found.neurons.tolist() == expected[0].tolist()
        torch.testing.assert_close(found.scores, expected[1], rtol=1e-6, atol=1e-9)
        assert float(found.scores[:4].sum()) < 0.2 * float(found.scores[4])


@pytest.mark.parametrize("native", [True, False])
def test_indefinite_blocks_are_named(device, native):
    V, H, G, columns = layer(5, 20, 2, device=device)
    bad = H.clone()
    bad[2 * 13 + 1, 2 * 13 + 1] = -1
    blocks = r"^greedy_selection: the block of neuron 13 of columns\[1\] in inverses\[1\] is not positive definite"
    with kfac_ext.use_native(native), pytest.raises(torch.linalg.LinAlgError, match=blocks):
        kfac_ext.greedy_selection([V, V], [H, bad], [G, G], [columns, columns], 3)
    across = torch.eye(4, dtype=torch.float64, device=device)
    across[0, 2] = across[2, 0] = 2.0  # each neuron's block is definite, the two together are not
    pair = torch.arange(4, device=device).view(2, 2)
    with kfac_ext.use_native(native):
        selection = kfac_ext.GreedySelection([V[:, :4]], [across], [G], [pair])
        together = r"^greedy_selection: inverses\[0\] is not positive definite at the columns of the neurons that go"
        before = selection.scores[0].clone()
        with pytest.raises(torch.linalg.LinAlgError, match=together):
            selection.remove_({0: [0, 1]})
        assert torch.equal(selection.scores[0], before) and selection.total == 0.0
        with pytest.raises(torch.linalg.LinAlgError, match=r"the block of neuron 1 of columns\[0\] in inverses\[0\]"):
            selection.remove_({0: [0]})


@pytest.mark.parametrize("native", [True, False])
def test_weights_that_are_not_finite_are_named(device, native):
    V, H, G, columns = layer(5, 8, 3, device=device)
    V[2, 3 * 7 + 1] = math.nan
    with kfac_ext.use_native(native), pytest.raises(ValueError, match="the score of neuron 7 is not finite"):
        kfac_ext.greedy_selection([V], [H], [G], [columns], 2)


# ---- bad calls ----

V, H, G, C = torch.ones(3, 4), torch.eye(4), torch.eye(3), torch.arange(4)[:, None]
SKEW = torch.eye(4).index_put_((torch.tensor(1), torch.tensor(2)), torch.tensor(0.5))
BAD = {
    "nothing": (ValueError, "weights is empty", ([], [], [], [], 1)),
    "tensor": (TypeError, r"weights\[0\] is a int, expected a tensor", ([1], [H], [G], [C], 1)),
    "count of layers": (ValueError, "inverses has 2 entries, expected 1", ([V], [H, H], [G], [C], 1)),
    "columns": (ValueError, "columns has 2 entries, expected 1: one for each of weights", ([V], [H], [G], [C, C], 1)),
    "H": (ValueError, r"inverses\[0\] has shape \(3, 3\), expected \(4, 4\)", ([V], [G], [G], [C], 1)),
    "G": (ValueError, r"Gs\[0\] has shape \(4, 4\), expected \(3, 3\)", ([V], [H], [H], [C], 1)),
    "dtype": (TypeError, r"Gs\[0\] has dtype torch.float64, the first", ([V], [H], [G.double()], [C], 1)),
    "half": (TypeError, r"weights\[0\] has dtype torch.float16", ([V.half()], [H.half()], [G.half()], [C], 1)),
    "device": (ValueError, r"inverses\[0\] is on meta", ([V], [H.to("meta")], [G], [C], 1)),
    "skew H": (ValueError, r"inverses\[0\] is not symmetric, entries .* differ by 0.5", ([V], [SKEW], [G], [C], 1)),
    "skew G": (ValueError, r"Gs\[0\] is not symmetric", ([V.mT], [G], [SKEW], [C[:3]], 1)),
    "int32": (TypeError, r"columns\[0\] has dtype torch.int32", ([V], [H], [G], [C.int()], 1)),
    "flat": (TypeError, r"columns\[0\] has dtype torch.int64 and shape \(4,\)", ([V], [H], [G], [C.flatten()], 1)),
    "range": (
        ValueError,
        r"columns\[0\] has indices from 1 to 4, expected columns 0 to 3",
        ([V], [H], [G], [C + 1], 1),
    ),
    "twice": (ValueError, r"columns\[0\] names a column twice", ([V], [H], [G], [C.expand(4, 2).clone()], 1)),
    "unequal": (ValueError, r"columns\[1\] has 2 neurons, columns\[0\] 4", ([V, V], [H, H], [G, G], [C, C[:2]], 1)),
    "many": (ValueError, "count is 5, expected 0 to 4, the number of neurons", ([V], [H], [G], [C], 5)),
    "negative": (ValueError, "count is -1, expected 0 to 4", ([V], [H], [G], [C], -1)),
    "number": (ValueError, "count is 1.5, expected 0 to 4", ([V], [H], [G], [C], 1.5)),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("native", [True, False])
def test_bad_calls(name, native):
    error, message, arguments = BAD[name]
    with kfac_ext.use_native(native), pytest.raises(error, match=f"^greedy_selection: ({message})"):
        kfac_ext.greedy_selection(*arguments)


def test_neurons_of_a_layer_that_overlap_are_refused():
    message = r"^greedy_selection: columns\[1\] names a column twice, or one of another neuron of the layer"
    with pytest.raises(ValueError, match=message):
        kfac_ext.GreedySelection([V], [H], [G], [C[:2], C[1:]], [0, 0])
    with pytest.raises(ValueError, match=r"^greedy_selection: layers\[1\] is 1, expected one of the 1 layers"):
        kfac_ext.GreedySelection([V], [H], [G], [C[:2], C[2:]], [0, 1])


@pytest.mark.parametrize("index", [[1], [4], [-1], [2, 2]])
def test_neurons_that_cannot_go_are_refused(index):
    selection = kfac_ext.GreedySelection([V], [H], [G], [C])
    selection.remove_({0: [1]})
    with pytest.raises(ValueError, match=r"^greedy_selection: neurons\[0\] is .* that have not gone"):
        selection.remove_({0: index})


@pytest.mark.parametrize("number", [-1, 1])
def test_lists_that_there_are_not_are_refused(number):
    selection = kfac_ext.GreedySelection([V], [H], [G], [C])
    for call in (selection.remove_, selection.change):
        with pytest.raises(ValueError, match=f"neurons names list {number} of columns, expected 0 to 0"):
            call({number: [0]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_rounding_makes_of_symmetry_is_borne(dtype):
    inverse = torch.linalg.inv(spd(300, dtype) + 0.01 * torch.eye(300, dtype=dtype))  # symmetric but for rounding
    off = inverse.clone()
    off[7, 250] += 1e-3 * inverse.abs().max()
    V, G, columns = torch.ones(2, 300, dtype=dtype), torch.eye(2, dtype=dtype), torch.arange(300)[:, None]
    assert len(kfac_ext.GreedySelection([V], [inverse], [G], [columns]).scores[0]) == 300
    with pytest.raises(ValueError, match=r"inverses\[0\] is not symmetric"):
        kfac_ext.GreedySelection([V], [off], [G], [columns])


# ---- operators ----


def test_opcheck():
    Vs, Hs, Gs, columns = layers_of((5, 4, 3, 1), (18, 4, 1))
    selection = kfac_ext.GreedySelection(Vs, Hs, Gs, columns)
    selection.remove_({0: [2], 1: [2]})
    state = (selection._Vs, selection._Hs, selection._Gs, selection._removed, selection._pending, [3, 3, 1, 1])
    lost = [columns[0][1], columns[1][1]]
    values = (selection._blocks, selection._forms, selection.scores)
    torch.library.opcheck(torch.ops.kfac_ext.greedy_remove_.default, (*state, lost, columns, [0, 1], *values))


def test_the_reference_serves_when_native_is_off(monkeypatch):
    monkeypatch.delattr(kfac_ext._C, "greedy_remove_cpu")
    with kfac_ext.use_native(False):
        assert kfac_ext.greedy_selection([V], [H], [G], [C], 2).neurons.tolist() == [0, 1]
    with pytest.raises(AttributeError):
        kfac_ext.greedy_selection([V], [H], [G], [C], 2)


def test_what_is_pending_is_bounded():
    """More columns than wait at once, and more in one removal than ever do."""
    V, H, G, columns = layer(5, 40, 5)
    selection = kfac_ext.GreedySelection([V], [H], [G], [columns])
    assert len(selection._pending[0]) == greedy._PENDING < 75
    for step in (range(3), range(3, 18), range(18, 19), range(19, 32)):
        selection.remove_({0: list(step)})
        gone = columns[: step.stop].flatten()
        kept = columns[step.stop :].flatten()
        torch.testing.assert_close(selection.weights()[0][:, kept], reference.compensate([V], [H], [gone])[0])
