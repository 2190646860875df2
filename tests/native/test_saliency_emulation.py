"""The CUDA scores of neurons without a GPU: the kernel run by simulated threads, alone and under the functions."""

import subprocess
from types import SimpleNamespace

import pytest
import torch

import kfac_ext
from kfac_ext import _C
from kfac_ext.ops import _saliency_kernels as kernels
from kfac_ext.ops import saliency
from tests.ops.test_saliency import LAYERS, layer, oracle, worst


@pytest.mark.parametrize("case", ["sizes", "networks", "failing"])
def test_schedules_against_float64(build_target, case):
    program = build_target("saliency_emulation") / "saliency_emulation"
    run = subprocess.run([program, case], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture
def launches(emulation, monkeypatch):
    """CPU tensors go the way of CUDA tensors; a list of the number of layers in each launch."""
    counts = []

    def launch(group, descriptors, pointers, *rest):
        counts.append(len(pointers))
        emulation.saliency_cuda(group, descriptors, pointers, *rest)

    compiled = {name: getattr(_C, name) for name in ("SaliencyGroup", "max_saliency_layers", "max_saliency_block")}
    monkeypatch.setattr(kernels, "_C", SimpleNamespace(**compiled, saliency_cuda=launch))
    monkeypatch.setattr(saliency, "_run", kernels.run_cuda)
    return counts


@pytest.mark.parametrize("obs", [False, True])
def test_all_layers_in_one_launch(launches, obs):
    layers = [layer(*shape, seed=i) for i, shape in enumerate(LAYERS)]
    weights, As, Gs, inverses, blocks = map(list, zip(*layers))
    matrices, function = (inverses, kfac_ext.obs_saliency) if obs else (As, kfac_ext.obd_saliency)
    scores = function(weights, matrices, Gs, blocks)
    for score, V, matrix, G, block in zip(scores, weights, matrices, Gs, blocks):
        assert worst(score, oracle(V, matrix, G, block, obs)) < 1e-5
    assert launches == [len(layers)]


def test_strides(launches):
    V, _, G, H, block = layer(20, 12, 4, 1)
    wide = torch.full((20, 60), torch.nan)
    wide[:, :49] = V
    exact = oracle(V, H, G, block, True)
    for weight in (wide[:, :49], V.mT.contiguous().mT):
        (score,) = kfac_ext.obs_saliency([weight], [H.mT], [G], [block])
        assert worst(score, exact) < 1e-5


def test_the_first_block_that_fails_is_named(launches):
    layers = [layer(6, 10, 4, seed=i) for i in range(2)]
    for neuron in (7, 3):
        layers[1][3][4 * neuron + 2, 4 * neuron + 2] = -1
    weights, _, Gs, inverses, blocks = map(list, zip(*layers))
    with pytest.raises(torch.linalg.LinAlgError, match=r"block of neuron 3 in inverses\[1\]"):
        kfac_ext.obs_saliency(weights, inverses, Gs, blocks)


def test_blocks_beyond_a_tile_are_left_to_the_reference(launches):
    V, A, G, _, _ = layer(3, 2, 100)
    assert not kernels.fits_cuda((V, A, G, 100)) and kernels.fits_cuda((V, A, G, 50))
    with pytest.raises(ValueError, match="a block of 100 columns, expected 1 to 64"):
        kernels.launch_cuda([(V, A, G, 100)], False)


def test_more_layers_than_parameters(launches):
    V, _, G, H, block = layer(3, 5, 2)
    scores = kfac_ext.obs_saliency([V] * 250, [H] * 250, [G] * 250, [block] * 250)
    assert launches == [120, 120, 10]
    assert all(torch.equal(score, scores[0]) for score in scores)


def test_kernels_without_a_gpu_pass_their_own_check(launches):
    assert kernels._check(torch.device("cpu")) < 0.3
