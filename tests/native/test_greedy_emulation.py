"""The CUDA kernels of greedy selection without a GPU: run by simulated threads, under the public functions."""

import subprocess
from types import SimpleNamespace

import pytest
import torch

import kfac_ext
from kfac_ext import _C, reference
from kfac_ext.ops import _greedy_kernels as kernels
from kfac_ext.ops import greedy
from tests.ops.test_greedy import SHAPES, layer, layers_of

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def poisoned():
    """What is allocated holds NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", ["steps", "wide", "failing"])
def test_steps_against_float64(build_target, case):
    program = build_target("greedy_emulation") / "greedy_emulation"
    run = subprocess.run([program, case], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture
def launches(emulation, monkeypatch):
    """CPU tensors go the way of CUDA tensors; a list of the number of layers in each launch."""
    counts = []

    def launch(layers, *rest):
        counts.append(len(layers))
        emulation.greedy_remove_cuda(layers, *rest)

    compiled = {name: getattr(_C, name) for name in ("greedy_floats", "max_greedy_block")}
    monkeypatch.setattr(kernels, "_C", SimpleNamespace(**compiled, greedy_remove_cuda=launch))
    monkeypatch.setattr(greedy, "_run", kernels.run_cuda)
    return counts


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_the_direct_algorithm_chooses_the_same(launches, shapes):
    Vs, Hs, Gs, columns = layers_of(*shapes, dtype=torch.float32)
    count = min(len(columns[0]), 12)
    found = kfac_ext.greedy_selection(Vs, Hs, Gs, columns, count)
    double = [[matrix.double() for matrix in matrices] for matrices in (Vs, Hs, Gs)]
    expected = reference.greedy_selection(*double, columns, count)
    assert found.neurons.tolist() == expected[0].tolist()
    torch.testing.assert_close(found.scores, expected[1], rtol=1e-3, atol=1e-6)
    for now, wanted in zip(found.weights, expected[2]):
        torch.testing.assert_close(now.double(), wanted, rtol=1e-3, atol=1e-3)
    assert launches == [len(shapes)] * (count + 1)


def test_many_columns_at_once_and_more_than_wait(launches):
    V, H, G, columns = layer(37, 40, 5, 1, dtype=torch.float32)
    selection = kfac_ext.GreedySelection([V], [H], [G], [columns])
    for step in (range(3), range(3, 15), range(15, 16), range(16, 28)):
        selection.remove_({0: list(step)})
        gone, kept = columns[: step.stop].flatten(), columns[step.stop :].flatten()
        exact = reference.compensate([V.double()], [H.double()], [gone])[0][:, :-1]
        torch.testing.assert_close(selection.weights()[0][:, kept].double(), exact, rtol=1e-3, atol=1e-3)


def test_blocks_too_wide_for_the_kernels_do_not_fit():
    V, H, G, columns = layer(7, 4, 65, dtype=torch.float32)
    state = V, H, G, columns.new_empty(260), 0, V.new_empty(64, 7), 0
    lists = [kernels.Neurons(columns.view(-1, width), 0, V, V, V) for width in (1, 52, 65)]
    for lost, given, fits in ((64, lists[:2], True), (65, lists[:2], False), (64, lists, False)):
        assert kernels.fits_cuda([kernels.Layer(*state, columns.flatten()[:lost])], given) is fits


def test_what_is_not_positive_definite_is_named(launches):
    V, H, G, columns = layer(5, 20, 2, dtype=torch.float32)
    bad = H.clone()
    bad[2 * 13 + 1, 2 * 13 + 1] = -1
    with pytest.raises(torch.linalg.LinAlgError, match=r"block of neuron 13 of columns\[1\] in inverses\[1\] is not"):
        kfac_ext.GreedySelection([V, V], [H, bad], [G, G], [columns, columns])
    across = torch.eye(40)
    across[0, 2] = across[2, 0] = 2.0
    selection = kfac_ext.GreedySelection([V, V], [H, across], [G, G], [columns, columns])
    before = [scores.clone() for scores in selection.scores]
    with pytest.raises(torch.linalg.LinAlgError, match=r"inverses\[1\] is not positive definite at the columns"):
        selection.remove_({0: [0, 1], 1: [0, 1]})
    assert all(map(torch.equal, before, selection.scores))


def test_the_kernels_check_themselves(launches):
    assert kernels._check(torch.device("cpu")) < 0.1
