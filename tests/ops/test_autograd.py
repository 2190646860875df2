"""What operators change in place, autograd knows of."""

import pytest
import torch

import kfac_ext

X = torch.randn(5, 3)

CHANGES = {
    "linear": lambda out: kfac_ext.linear_covariance_(out, X),
    "conv2d": lambda out: kfac_ext.conv2d_covariance_(out, X[:, :, None, None], 1),
    "gradient": lambda out: kfac_ext.gradient_covariance_(out, X),
    "group": lambda out: kfac_ext.ops.covariance_group.covariance_group_(
        [out], [kfac_ext.CovarianceUpdate.linear("key", X)]
    ),
    "power": lambda out: kfac_ext.power_iteration_([out[0]], [torch.eye(3)]),
    "power by name": lambda out: torch.ops.kfac_ext.power_iteration_(out.view(-1), [0], [torch.eye(3)], 0.0, 2),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("native", [True, False])
def test_a_backward_that_needs_what_was_overwritten_is_refused(name, native):
    w = torch.randn(3, 3, requires_grad=True)
    y = w.exp()  # its backward reads y
    with kfac_ext.use_native(native):
        CHANGES[name](y.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", CHANGES)
def test_an_output_that_requires_grad_is_refused(name):
    leaf = torch.ones(3, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="requires grad"):
        CHANGES[name](leaf)
    assert torch.equal(leaf.detach(), torch.ones(3, 3))
    with torch.no_grad():
        CHANGES[name](leaf)
    assert not torch.equal(leaf.detach(), torch.ones(3, 3))


def test_a_call_that_is_refused_counts_as_no_change():
    out = torch.ones(3, 3)
    version = out._version
    with pytest.raises(ValueError, match="decay"):
        kfac_ext.linear_covariance_(out, X, decay=float("inf"))
    assert out._version == version


def test_tensors_of_inference_mode_have_no_version():
    with torch.inference_mode():
        out = torch.ones(3, 3)
        assert torch.equal(kfac_ext.linear_covariance_(out, X), kfac_ext.linear_covariance(X))
