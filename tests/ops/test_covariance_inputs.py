"""Strided convolutions, and inputs of 16 bits, channels last or strided: read as they are."""

import pytest
import torch

import kfac_ext
from kfac_ext import reference
from tests.conftest import relative_error
from tests.ops.covariance_oracle import allowed, oracle

STRIDED = {
    "3x3 /2": {"shape": (2, 20, 9, 13), "kernel_size": 3, "stride": 2, "padding": 1},
    "3x3 /2 valid": {"shape": (2, 17, 12, 8), "kernel_size": 3, "stride": 2, "padding": 0},
    "3x3 /3": {"shape": (2, 33, 7, 11), "kernel_size": 3, "stride": 3, "padding": 1},
    "5x5 /2": {"shape": (2, 18, 15, 14), "kernel_size": 5, "stride": 2, "padding": 2},
    "5x5 /3": {"shape": (2, 16, 11, 17), "kernel_size": 5, "stride": 3, "padding": 2},
    "3x3 /2 dilated": {"shape": (2, 16, 13, 16), "kernel_size": 3, "stride": 2, "padding": 3, "dilation": 2},
    "3x5 /(3, 2)": {
        "shape": (2, 16, 14, 13),
        "kernel_size": (3, 5),
        "stride": (3, 2),
        "padding": (1, 2),
        "dilation": (2, 1),
    },
    "3x3 /2 in 2 groups": {"shape": (2, 34, 9, 11), "kernel_size": 3, "stride": 2, "padding": 1, "groups": 2},
    "depthwise /3": {"shape": (2, 24, 9, 7), "kernel_size": 3, "stride": 3, "padding": 1, "groups": 24},
    "2x2 /3": {"shape": (2, 20, 8, 11), "kernel_size": 2, "stride": 3},
    "1x1 /(1, 2)": {"shape": (2, 20, 5, 9), "kernel_size": 1, "stride": (1, 2)},
    "7x7 /2": {"shape": (2, 3, 20, 17), "kernel_size": 7, "stride": 2, "padding": 3},
    "one pixel": {"shape": (2, 1, 1, 1), "kernel_size": (1, 2), "stride": 2, "padding": (0, 1)},
}
VIEWS = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "apart": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "turned": lambda x: x.mT.contiguous().mT,
    "cut out": lambda x: torch.nn.functional.pad(x, (1, 2, 2, 1, 3, 0))[:, 3:, 2:-1, 1:-2],
}


@pytest.mark.parametrize("layer", STRIDED)
@pytest.mark.parametrize("mode", ["expand", "reduce"])
@pytest.mark.parametrize("view", VIEWS)
def test_strides_against_patches_by_index(device, layer, mode, view):
    options = dict(STRIDED[layer])
    x = VIEWS[view](torch.randn(options.pop("shape"), device=device, dtype=torch.float64))
    value = kfac_ext.conv2d_covariance(x, **options, mode=mode, bias=True)
    assert relative_error(value, oracle(x, **options, mode=mode, bias=True)) < 1e-13
    assert torch.equal(value, value.mT)


@pytest.mark.parametrize("layer", STRIDED)
@pytest.mark.parametrize("algorithm", [1, 2])
def test_both_algorithms_at_any_stride(layer, algorithm):
    from kfac_ext import _C
    from kfac_ext.geometry import conv_geometry
    from kfac_ext.ops._covariance_kernels import conv_shape

    options = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, **STRIDED[layer]}
    x = torch.randn(options.pop("shape"), dtype=torch.float64)
    geometry = conv_geometry(x.shape, **options)
    exact = oracle(x, **options)
    out, shape = torch.full_like(exact, torch.nan), list(conv_shape(x, geometry))
    scale = 1 / (len(x) * geometry.output_size[0] * geometry.output_size[1])
    place = x.data_ptr(), 1, list(x.stride()), shape, False, algorithm
    _C.covariance_cpu(*place, False, 0.0, scale, out.data_ptr(), 1)
    assert relative_error(out, exact) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("layer", STRIDED)
def test_precision_at_any_stride(device, dtype, view, layer):
    options = dict(STRIDED[layer])
    x = VIEWS[view](torch.randn(options.pop("shape"), device=device).to(dtype))
    exact, plain = (reference.conv2d_covariance(image, **options) for image in (x.double(), x))
    value = kfac_ext.conv2d_covariance(x, **options)
    assert relative_error(value, exact) <= allowed(dtype, plain, exact)


CALLS = {
    "3x3": lambda x: kfac_ext.conv2d_covariance(x, 3, padding=1, bias=True),
    "3x3 /2": lambda x: kfac_ext.conv2d_covariance(x, 3, stride=2, padding=1),
    "few channels": lambda x: kfac_ext.conv2d_covariance(x[:, :3], 7, stride=2, padding=3),
    "reduce": lambda x: kfac_ext.conv2d_covariance(x, 3, padding=1, mode="reduce"),
    "gradient": kfac_ext.gradient_covariance,
    "rows": lambda x: kfac_ext.linear_covariance(x, bias=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("call", CALLS)
def test_the_same_bits_as_of_a_float32_copy(dtype, view, call):
    x = torch.randn(3, 37, 14, 19).to(dtype)
    assert torch.equal(CALLS[call](VIEWS[view](x)), CALLS[call](x.float()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pixels", [1, 19])
def test_every_number_of_16_bits(dtype, pixels):
    """Subnormal ones, infinities and NaN too; read as neighbours (one pixel) or each from its own channel."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    x = torch.zeros(1, len(every), 1, pixels, dtype=dtype)
    where = torch.arange(len(every))
    x[0, where, 0, where % pixels] = every
    squares = kfac_ext.conv2d_covariance(x, 1, groups=len(every)).flatten() * pixels
    torch.testing.assert_close(squares, every.float() ** 2, rtol=3e-7, atol=1e-40, equal_nan=True)
