"""The covariance of patches gathered one pixel at a time, and how far from it a kernel may be."""

import itertools

import torch

from kfac_ext.geometry import conv_geometry
from tests.conftest import relative_error


def patches(x, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=False):
    """Every patch by indexing, one pixel at a time: [groups, N, S, d] in float64."""
    geometry = conv_geometry(x.shape, kernel_size, stride, padding, dilation, groups)
    image = torch.nn.functional.pad(x.double(), geometry.padding)
    rows = []
    (sy, sx), (dy, dx) = geometry.stride, geometry.dilation
    for y, x0 in itertools.product(*map(range, geometry.output_size)):
        taps = itertools.product(*map(range, geometry.kernel_size))
        pixels = [image[:, :, y * sy + i * dy, x0 * sx + j * dx] for i, j in taps]
        rows.append(torch.stack(pixels, dim=2).unflatten(1, (groups, -1)).flatten(2))
    result = torch.stack(rows, dim=2).transpose(0, 1)  # [groups, N, S, d]
    return torch.cat([result, torch.ones_like(result[..., :1])], dim=-1) if bias else result


def oracle(x, kernel_size, mode="expand", **options):
    rows = patches(x, kernel_size, **options)
    rows = rows.mean(dim=2) if mode == "reduce" else rows.flatten(1, 2)
    factors = rows.mT @ rows / rows.shape[1]
    return factors if options.get("groups", 1) > 1 else factors[0]


def allowed(dtype, plain, exact):
    """Twice plain PyTorch's error in the same dtype, but a rounding or two (float64's oracle is no better)."""
    return 1e-14 if dtype == torch.float64 else max(2 * relative_error(plain, exact), 2.4e-7)
