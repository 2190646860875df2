"""Every public operation computes in its own dtype under autocast, with native kernels and without."""

from types import SimpleNamespace

import pytest
import torch

import kfac_ext
from kfac_ext import CovarianceUpdate, FactorSet

HALF = {"cpu": torch.bfloat16, "cuda": torch.float16}


def given_inputs(device):
    """Made outside of autocast, the same each time."""
    generator = torch.Generator().manual_seed(0)
    image, rows, gradients, V = (
        torch.randn(shape, generator=generator).to(device) for shape in ((4, 3, 6, 6), (30, 20), (4, 5, 6, 6), (6, 12))
    )
    many = [torch.randn(2 * n, n, generator=generator) + 0.3 for n in (12, 6, 40)]
    A, G, large = ((x.mT @ x / len(x)).to(device) for x in many)
    H = torch.linalg.inv(A + 0.1 * torch.eye(12, device=device))
    return SimpleNamespace(image=image, rows=rows, g=gradients, V=V, A=A, G=G, large=large, H=(H + H.mT) / 2)


def accumulated(i):
    factors, kinds = FactorSet({"conv.A": 28, "fc.A": 20, "conv.G": 5}, device=i.image.device), CovarianceUpdate
    conv = kinds.conv2d("conv.A", i.image, 3, padding=1, bias=True)
    factors.accumulate_([conv, kinds.linear("fc.A", i.rows), kinds.gradient("conv.G", i.g)])
    found = factors.power_iteration_(max_iter=8)
    return [factors.buffer, found.eigenvalues, factors.damped_inverse(0.1)[0].buffer]


def selected(i):
    columns = torch.arange(12, device=i.V.device).view(6, 2)
    selection = kfac_ext.GreedySelection([i.V], [i.H], [i.G], [columns])
    selection.remove_({0: [1]})
    chosen = kfac_ext.greedy_selection([i.V], [i.H], [i.G], [columns], 3)
    return [selection.scores[0][2:], *selection.weights(), chosen.scores, *chosen.weights]


OPERATIONS = {
    "linear_covariance": lambda i: [kfac_ext.linear_covariance(i.rows, bias=True)],
    "linear_covariance_": lambda i: [kfac_ext.linear_covariance_(i.A.new_ones(20, 20), i.rows, decay=0.5)],
    "conv2d_covariance": lambda i: [kfac_ext.conv2d_covariance(i.image, 3, padding=1)],
    "conv2d_covariance_": lambda i: [kfac_ext.conv2d_covariance_(i.A.new_ones(27, 27), i.image, 3, decay=0.5)],
    "gradient_covariance": lambda i: [kfac_ext.gradient_covariance(i.g)],
    "gradient_covariance_": lambda i: [kfac_ext.gradient_covariance_(i.A.new_ones(5, 5), i.g, decay=0.5)],
    "power_iteration": lambda i: [kfac_ext.power_iteration([i.A, i.large], max_iter=8).eigenvalues],
    "power_iteration_": lambda i: kfac_ext.power_iteration_([i.A.new_ones(12)], [i.A], max_iter=8).eigenvectors,
    "covariance_power_iteration": lambda i: [kfac_ext.covariance_power_iteration(i.image, 3, max_iter=8).eigenvalues],
    "damped_inverse": lambda i: kfac_ext.damped_inverse([i.A, i.large], 0.01),
    "damped_inverse_ex": lambda i: kfac_ext.damped_inverse_ex([i.A, i.G], 0.01, pi=[(0, 1)])[0],
    "obd_saliency": lambda i: kfac_ext.obd_saliency([i.V], [i.A], [i.G], [2]),
    "obs_saliency": lambda i: kfac_ext.obs_saliency([i.V], [i.H], [i.G], [2]),
    "compensate": lambda i: kfac_ext.compensate([i.V], [i.H], [torch.tensor([1, 5], device=i.V.device)]),
    "GreedySelection": selected,
    "FactorSet": accumulated,
}


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", OPERATIONS)
def test_autocast_changes_no_bit(device, native, name):
    found = []
    for enabled in (False, True):
        inputs = given_inputs(device)
        with kfac_ext.use_native(native), torch.autocast(device, dtype=HALF[device], enabled=enabled):
            found.append(OPERATIONS[name](inputs))
    for plain, cast in zip(*found):
        assert plain.dtype == cast.dtype and torch.equal(plain, cast)


def test_every_public_operation_is_tried():
    kinds = {"CovarianceUpdate", "Curvature", "GreedyChoice", "KFACPreconditioner", "PowerIteration"}
    rest = {"__version__", "build_info", "reference", "use_native"}
    tried = {*OPERATIONS, "greedy_selection"}  # in `selected`
    assert set(kfac_ext.__all__) - tried == kinds | rest
