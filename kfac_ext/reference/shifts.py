"""The covariance of a stride-1 convolution from the gradient of a convolution's weight: no patch, one library call."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from kfac_ext.geometry import ConvGeometry, Pair, accumulator_dtype, conv_geometry


def conv2d_covariance_by_shifts(x: Tensor, kernel_size: Pair, *, padding: Pair | str = 0, bias: bool = False) -> Tensor:
    """`conv2d_covariance` of a convolution of stride 1, dilation 1 and one group.

    R[s] = sum over n, u of x[n, c, u] x[n, c', u + s] for all (2 kh - 1)(2 kw - 1) shifts s is
    `torch.nn.grad.conv2d_weight` of x with itself, which cuDNN and oneDNN compute. Block (p, q) of the covariance is
    R[q - p] less the terms whose u lies outside of p's window: up to four strips along the border.

    Args:
        x: [N, C, H, W].
        kernel_size, padding, bias: as for `kfac_ext.conv2d_covariance`.

    Returns:
        [d, d], d = C kh kw (+1); float32, float64 for float64 x.

    Example:
        >>> x = torch.randn(8, 16, 32, 32)
        >>> kfac_ext.reference.conv2d_covariance_by_shifts(x, 3, padding=1).shape
        torch.Size([144, 144])
    """
    geometry = conv_geometry(x.shape, kernel_size, 1, padding, 1, 1)
    x = x.to(accumulator_dtype(x.dtype))
    n, c, _, _ = x.shape
    (kh, kw), (out_h, out_w) = geometry.kernel_size, geometry.output_size
    reach = (kh - 1, kw - 1)
    around = F.pad(x, (reach[1], reach[1], reach[0], reach[0]))
    shifts = conv2d_weight(around, (c, c, 2 * kh - 1, 2 * kw - 1), x)
    patch = c * kh * kw
    result = x.new_ones(patch + bias, patch + bias)
    blocks = x.new_empty(c, kh, kw, c, kh, kw)
    sums = x.new_empty(c, kh, kw)
    for py in range(kh):
        for px in range(kw):
            y, z = reach[0] - py, reach[1] - px
            inside, strips = _window(geometry, py, px, x)
            block = shifts[:, :, y : y + kh, z : z + kw]
            for y0, y1, x0, x1 in strips:
                seen = around[:, :, y0 + y : y1 + y + reach[0], x0 + z : x1 + z + reach[1]]
                block = block - conv2d_weight(seen, (c, c, kh, kw), x[:, :, y0:y1, x0:x1])
            blocks[:, py, px] = block
            sums[:, py, px] = x[:, :, inside[0] : inside[1], inside[2] : inside[3]].sum(dim=(0, 2, 3))
    rows = n * out_h * out_w
    result[:patch, :patch] = blocks.view(patch, patch) / rows
    if bias:
        result[patch, :patch] = result[:patch, patch] = sums.flatten() / rows
    return result


Box = tuple[int, int, int, int]  # y0, y1, x0, x1


def _window(geometry: ConvGeometry, py: int, px: int, x: Tensor) -> tuple[Box, list[Box]]:
    """The pixels that kernel position (py, px) meets, and the strips of those that it does not."""
    height, width = x.shape[2:]
    left, _, above, _ = geometry.padding
    top = min(max(py - above, 0), height)
    bottom = max(min(py - above + geometry.output_size[0], height), top)
    start = min(max(px - left, 0), width)
    end = max(min(px - left + geometry.output_size[1], width), start)
    strips = [(0, top, 0, width), (bottom, height, 0, width), (top, bottom, 0, start), (top, bottom, end, width)]
    return (top, bottom, start, end), [(a, b, c, d) for a, b, c, d in strips if a < b and c < d]
