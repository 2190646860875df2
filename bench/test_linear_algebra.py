"""Damped inverses, dominant eigenpairs and saliencies of all factors of a network."""

import pytest
import torch

import kfac_ext
from bench import baselines, peers, worksets
from bench.check import agreeing
from kfac_ext.reference.power import start_vector

DAMPING = 1e-2
TOL = 1e-3
NETWORKS = {
    "VGG-small": worksets.vgg(64, worksets.VGG_SMALL),
    "ResNet32": worksets.resnet(32, 5),
    "MLP": worksets.mlp(256),
    "VGG19, each shape once": worksets.distinct(worksets.vgg(32, worksets.VGG19)),
}
QUICK = ("ResNet32",)


@pytest.fixture(params=NETWORKS)
def network(request, quick):
    if quick and request.param not in QUICK:
        pytest.skip("full runs only")
    return request.param


def test_inverses(measure, network):
    matrices = worksets.factors(NETWORKS[network])
    foreign, skipped = peers.available(peers.inverses(matrices, DAMPING))
    variants = {
        "native": lambda: kfac_ext.damped_inverse(matrices, DAMPING),
        "linalg.inv": lambda: baselines.linalg_inverses(matrices, DAMPING),
        "cholesky": lambda: baselines.cholesky_inverses(matrices, DAMPING),
        **foreign,
    }
    measure(
        "inverse",
        network,
        agreeing(variants, "cholesky", skipped, tolerance=1e-2),
        skipped=skipped,
        matrices=len(matrices),
        sizes=sorted({len(m) for m in matrices}),
    )


def power_variants(matrices, vectors):
    return {
        "native": lambda: kfac_ext.power_iteration(matrices, vectors, tol=TOL).eigenvalues,
        "loop": lambda: baselines.power_loop(matrices, vectors, TOL, 100),
    }


def test_cold_power_iteration(measure, quick, network):
    matrices = worksets.factors(NETWORKS[network])
    starts = [start_vector(len(m), m.dtype) for m in matrices]
    variants = agreeing(power_variants(matrices, starts), "loop", {})
    if not quick and max(len(m) for m in matrices) < 1000:
        variants["eigvalsh"] = lambda: baselines.eigvalsh_largest(matrices)
    measure("power iteration", f"cold, {network}", variants, matrices=len(matrices))


def test_warm_power_iteration(measure, network):
    """From the eigenvectors of factors that have changed by a tenth since."""
    before = worksets.factors(NETWORKS[network])
    vectors = kfac_ext.power_iteration(before, tol=TOL).eigenvectors
    generator = torch.Generator().manual_seed(0)
    scales = [0.95 + 0.1 * torch.rand(len(m), generator=generator) for m in before]
    matrices = [s[:, None] * m * s for m, s in zip(before, scales)]
    variants = agreeing(power_variants(matrices, vectors), "loop", {})
    measure("power iteration", f"warm, {network}", variants, matrices=len(matrices))


@pytest.mark.parametrize("criterion", ["obs_saliency", "obd_saliency"])
def test_saliency(measure, network, criterion):
    layers = NETWORKS[network]
    matrices = worksets.factors(layers)
    weights = [worksets.weight(layer) for layer in layers]
    As, Gs = matrices[::2], matrices[1::2]
    if criterion == "obs_saliency":
        As = kfac_ext.damped_inverse(As, DAMPING)
    blocks = [layer.kernel**2 for layer in layers]
    variants = {
        "native": lambda: getattr(kfac_ext, criterion)(weights, As, Gs, blocks),
        "batched": lambda: getattr(kfac_ext.reference, criterion)(weights, As, Gs, blocks),
    }
    if criterion == "obs_saliency":
        variants["neuron loop"] = lambda: baselines.neuron_loop(weights, As, Gs, blocks)
    measure("saliency", f"{criterion}, {network}", agreeing(variants, "batched", {}), layers=len(layers))


def test_compensation(measure, network):
    """A tenth of the neurons of every layer go."""
    layers = NETWORKS[network]
    weights = [worksets.weight(layer) for layer in layers]
    inverses = kfac_ext.damped_inverse(worksets.factors(layers)[::2], DAMPING)
    pruned = [torch.arange(max(1, layer.channels // 10) * layer.kernel**2) for layer in layers]
    variants = {
        "native": lambda: kfac_ext.compensate(weights, inverses, pruned),
        "per layer": lambda: kfac_ext.reference.compensate(weights, inverses, pruned),
    }
    measure("saliency", f"compensate, {network}", agreeing(variants, "per layer", {}), layers=len(layers))
