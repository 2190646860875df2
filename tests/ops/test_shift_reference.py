"""The covariance through the gradient of a weight, against patches multiplied out."""

import pytest
import torch

from kfac_ext import reference
from tests.conftest import relative_error


@pytest.mark.parametrize("shape", [(3, 5, 7, 7), (2, 3, 6, 9), (2, 4, 2, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("kernel, padding", [(3, 1), (5, 2), (4, "same"), ((1, 3), (0, 2)), (3, 3), (1, 0)])
@pytest.mark.parametrize("bias", [False, True])
def test_all_blocks(shape, kernel, padding, bias):
    x = torch.randn(shape, dtype=torch.float64)
    value = reference.conv2d_covariance_by_shifts(x, kernel, padding=padding, bias=bias)
    exact = reference.conv2d_covariance(x, kernel, padding=padding, bias=bias)
    assert relative_error(value, exact) < 1e-13


def test_a_window_inside_of_the_image():
    x = torch.randn(2, 3, 9, 8)
    exact = reference.conv2d_covariance(x.double(), (3, 2))
    assert relative_error(reference.conv2d_covariance_by_shifts(x, (3, 2)), exact) < 1e-6


def test_bad_geometry_is_named():
    with pytest.raises(ValueError, match="exceeds the padded input"):
        reference.conv2d_covariance_by_shifts(torch.randn(1, 1, 2, 2), 3)
