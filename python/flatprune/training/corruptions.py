"""Test images made worse on purpose: noise, blur and loss of contrast at five strengths each.

After Hendrycks & Dietterich 2019 (arXiv 1903.12261), whose strengths for images of 32x32 these are; made here from the
test images at hand, so that no other data set is needed, and the same at every call.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flatprune.data import Normalization

STRENGTHS = (1, 2, 3, 4, 5)
_NOISE_DEVIATIONS = (0.04, 0.06, 0.08, 0.09, 0.10)  # of the range of the pixels
_BLUR_DEVIATIONS = (0.4, 0.6, 0.7, 0.8, 1.0)  # pixels, for images 32 pixels high
_CONTRASTS = (0.75, 0.5, 0.4, 0.3, 0.15)  # fraction of the contrast that is left
_BLUR_HEIGHT = 32
_LEAST_BLUR = 0.2  # pixels; a narrower Gaussian changes nothing on the grid
_NOISE_SEED = 0


def corrupted(images: Tensor, normalization: Normalization, kind: str, strength: int) -> Tensor:
    """Normalised images, corrupted as pixels and normalised again.

    noise: p + s e, e ~ N(0, 1) from a fixed seed. blur: a Gaussian of s pixels (times height / 32). contrast:
    m + s (p - m), m the image's mean a channel. Pixels are cut off at the least and largest of `images`.

    Args:
        images: normalised float32 [n, channels, height, width].
        normalization: how they were normalised.
        kind: one of `KINDS`.
        strength: 1 to 5.

    Raises:
        ValueError: another kind or strength.

    Example:
        >>> harder = corrupted(dataset.x_test, dataset.normalization, "noise", 3)
    """
    if kind not in KINDS:
        raise ValueError(f"corrupted: kind is {kind!r}, expected one of {', '.join(KINDS)}")
    if strength not in STRENGTHS:
        raise ValueError(f"corrupted: strength is {strength!r}, expected 1 to {STRENGTHS[-1]}")
    mean, std = (value.to(images.device).view(1, -1, 1, 1) for value in (normalization.mean, normalization.std))
    pixels = images * std + mean
    low, high = pixels.amin(), pixels.amax()
    changed = KINDS[kind](pixels, high - low, strength - 1)
    return changed.clamp(low, high).sub_(mean).div_(std)


def _noise(pixels: Tensor, span: Tensor, level: int) -> Tensor:
    generator = torch.Generator().manual_seed(_NOISE_SEED)
    noise = torch.randn(pixels.shape, generator=generator).to(pixels.device)
    return pixels + _NOISE_DEVIATIONS[level] * span * noise


def _blur(pixels: Tensor, span: Tensor, level: int) -> Tensor:
    deviation = max(_LEAST_BLUR, _BLUR_DEVIATIONS[level] * pixels.shape[2] / _BLUR_HEIGHT)
    radius = min(max(1, math.ceil(3 * deviation)), min(pixels.shape[2:]) - 1)
    offsets = torch.arange(-radius, radius + 1, device=pixels.device, dtype=pixels.dtype)
    weights = torch.exp(-0.5 * (offsets / deviation) ** 2)
    weights /= weights.sum()
    channels = pixels.shape[1]
    padded = torch.nn.functional.pad(pixels, (radius,) * 4, mode="reflect")
    rows = torch.nn.functional.conv2d(padded, weights.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return torch.nn.functional.conv2d(rows, weights.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)


def _contrast(pixels: Tensor, span: Tensor, level: int) -> Tensor:
    mean = pixels.mean(dim=(2, 3), keepdim=True)
    return mean + _CONTRASTS[level] * (pixels - mean)


KINDS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {"noise": _noise, "blur": _blur, "contrast": _contrast}
