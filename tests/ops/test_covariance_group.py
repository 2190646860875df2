import math

import pytest
import torch

import kfac_ext
from kfac_ext import CovarianceUpdate, FactorSet
from tests.conftest import relative_error

SIZES = {"conv.A": 163, "conv.G": 16, "depthwise.A": (18, 9), "fc.A": 21, "fc.G": 10}


def updates(device, dtype, decay):
    generator = torch.Generator().manual_seed(2)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    image, kinds = draw(3, 18, 6, 7), CovarianceUpdate
    return [
        kinds.conv2d("conv.A", image, 3, padding=1, bias=True, decay=decay, scale=0.3),
        kinds.gradient("conv.G", draw(3, 16, 6, 7), mode="reduce", decay=decay, scale=2.0),
        kinds.conv2d("depthwise.A", image, 3, stride=2, padding="valid", groups=18, decay=decay),
        kinds.linear("fc.A", draw(4, 5, 20), bias=True, decay=decay, scale=0.5),
        kinds.gradient("fc.G", draw(20, 10), decay=decay),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_group_is_its_members_one_by_one(device, dtype, decay):
    factors, exact = FactorSet(SIZES, device=device), FactorSet(SIZES, dtype=torch.float64)
    for key in SIZES:
        factors[key].fill_(1.0 if decay else math.nan)
        exact[key].fill_(1.0)
    factors.accumulate_(updates(device, dtype, decay))
    with kfac_ext.use_native(False):
        exact.accumulate_([u._replace(x=u.x.double().cpu()) for u in updates(device, dtype, decay)])
    for key in SIZES:
        assert relative_error(factors[key], exact[key]) < 1e-6, key
        assert decay or torch.equal(factors[key], factors[key].mT)


def test_two_runs_are_bitwise_equal(device):
    first, second = FactorSet(SIZES, device=device), FactorSet(SIZES, device=device)
    first.accumulate_(updates(device, torch.float32, 0.5))
    second.accumulate_(updates(device, torch.float32, 0.5))
    assert torch.equal(first.buffer, second.buffer)


def test_a_factor_may_come_twice(device):
    factors = FactorSet({"fc.A": 4}, dtype=torch.float64, device=device)
    x, y = torch.randn(2, 8, 4, dtype=torch.float64, device=device)
    factors.accumulate_([CovarianceUpdate.linear("fc.A", x), CovarianceUpdate.linear("fc.A", y, decay=0.5)])
    exact = 0.5 * kfac_ext.reference.linear_covariance(x) + kfac_ext.reference.linear_covariance(y)
    assert relative_error(factors["fc.A"], exact) < 1e-14


def test_no_updates_do_nothing():
    FactorSet(SIZES).accumulate_([])


def test_an_update_that_does_not_fit_changes_nothing():
    factors = FactorSet({"fc.A": 4, "fc.G": 2})
    good, bad = CovarianceUpdate.linear("fc.A", torch.randn(8, 4)), CovarianceUpdate.gradient("fc.G", torch.randn(8, 3))
    with pytest.raises(ValueError, match=r"gradient_covariance: out has shape \(2, 2\), expected \(3, 3\)"):
        factors.accumulate_([good, bad])
    with pytest.raises(KeyError, match=r"no factor named 'fc\.X'"):
        factors.accumulate_([good, good._replace(key="fc.X")])
    assert not factors.buffer.any()


def test_arguments_are_checked_when_an_update_is_made():
    with pytest.raises(ValueError, match="mode is 'mean'"):
        CovarianceUpdate.gradient("", torch.ones(2, 2), mode="mean")
    with pytest.raises(ValueError, match="exceeds the padded input"):
        CovarianceUpdate.conv2d("", torch.ones(1, 1, 2, 2), 3)


def test_opcheck():
    given = updates("cpu", torch.float32, 0.5)
    outs = [torch.zeros(size if isinstance(size, tuple) else (size, size)) for size in SIZES.values()]
    outs[2] = torch.zeros(18, 9, 9)
    calls = [value for update in given for value in update.call]
    arguments = (outs, [u.x for u in given], calls, [u.decay for u in given], [u.scale for u in given])
    torch.library.opcheck(torch.ops.kfac_ext.covariance_group_.default, arguments)
