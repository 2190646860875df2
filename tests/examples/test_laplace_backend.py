"""The backend for laplace-torch against laplace's own of curvlinops; skipped where laplace is not installed."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.examples.loading import example

for needed in ("laplace", "curvlinops"):
    pytest.importorskip(needed)
pytestmark = [pytest.mark.thorough, pytest.mark.filterwarnings("ignore")]  # laplace takes seconds to import


@pytest.fixture(scope="module")
def backend():
    return example("laplace_backend").KfacExtGGN


def mlp(outputs):
    layers = [nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 5, bias=False), nn.ReLU(), nn.Linear(5, outputs)]
    return nn.Sequential(nn.Flatten(), *layers)


def conv(outputs):
    first = [nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4).requires_grad_(False), nn.ReLU()]
    second = [nn.Conv2d(4, 6, (3, 2), stride=2), nn.ReLU()]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(36, outputs))


def case(build, shape, likelihood, outputs=3, n=10):
    torch.manual_seed(0)
    model = build(outputs).double()
    for norm in model:
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
            norm.weight.data.uniform_(0.5, 2.0)
    x = torch.randn(n, *shape, dtype=torch.float64)
    y = torch.randint(outputs, (n,)) if likelihood == "classification" else torch.randn(n, outputs).double()
    return model.eval(), x, y


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize(("build", "shape"), [(mlp, (12,)), (conv, (3, 5, 6))])
def test_factors_are_those_of_laplaces_own_backend(backend, build, shape, likelihood):
    from laplace.curvature import CurvlinopsGGN

    model, x, y = case(build, shape, likelihood)
    expected_loss, expected = CurvlinopsGGN(model, likelihood).kron(x, y, N=25)
    loss, found = backend(model, likelihood).kron(x, y, N=25)
    torch.testing.assert_close(loss, expected_loss)
    assert len(found.kfacs) == len(expected.kfacs) > 3
    for ours, theirs in zip(found.kfacs, expected.kfacs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-10)
    assert not any(module._forward_hooks for module in model.modules())


def test_columns_make_the_hessian_of_any_outputs(backend):
    """Also where a class has all of the mass, or none."""
    f = torch.tensor([[1.0, -2.0, 0.5, 3.0], [200.0, 0.0, -300.0, 90.0], [-400.0, -400.0, 0.0, -800.0]])
    columns = torch.stack(list(backend(mlp(4), "classification")._columns(f)))
    assert len(columns) == 3 and columns.isfinite().all()
    p = f.softmax(dim=1)
    exact = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    torch.testing.assert_close(torch.einsum("kni,knj->nij", columns, columns), exact, rtol=1e-5, atol=1e-12)


def test_an_activation_in_place_changes_nothing(backend):
    model, x, y = case(conv, (3, 5, 6), "classification")
    _, expected = backend(model, "classification").kron(x, y, N=10)
    for module in model:
        if isinstance(module, nn.ReLU):
            module.inplace = True
    _, found = backend(model, "classification").kron(x, y, N=10)
    for ours, theirs in zip(found.kfacs, expected.kfacs, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_a_fitted_laplace_is_the_same(backend, subset):
    from laplace import Laplace
    from laplace.curvature import CurvlinopsGGN

    model, x, y = case(conv, (3, 5, 6), "classification")
    loader = DataLoader(TensorDataset(x, y), batch_size=4)  # the last batch is smaller
    evidence, predicted = [], []
    for kind in (CurvlinopsGGN, backend):
        fitted = Laplace(model, "classification", subset_of_weights=subset, hessian_structure="kron", backend=kind)
        fitted.fit(loader)
        evidence.append(fitted.log_marginal_likelihood().detach())
        predicted.append(fitted(x).detach())
    torch.testing.assert_close(evidence[1], evidence[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(predicted[1], predicted[0], rtol=1e-5, atol=1e-8)


def test_what_it_cannot_do_is_refused(backend):
    model, x, y = case(conv, (3, 5, 6), "classification")
    with pytest.raises(ValueError, match="stochastic is True"):
        backend(model, "classification", stochastic=True).kron(x, y, N=10)
    model[1].requires_grad_(True)
    with pytest.raises(ValueError, match=r"'1\.weight', '1\.bias'\] are of no Linear or Conv2d"):
        backend(model, "classification").kron(x, y, N=10)
    grouped = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2))
    with pytest.raises(ValueError, match="expected one group"):
        backend(grouped, "classification").kron(x, y, N=10)
    pixels = nn.Sequential(nn.Conv2d(3, 4, 1)).double()
    with pytest.raises(ValueError, match="output has shape"):
        backend(pixels, "classification").kron(x, y, N=10)
