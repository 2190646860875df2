"""Checks that all networks share: the images are large enough, and there are as many widths as the network has."""

from __future__ import annotations

from collections.abc import Sequence

from flatprune.errors import InputError

MIN_IMAGE_SIZE = 8  # of the networks that are no perceptron


def need_size(name: str, image_shape: tuple[int, int, int]) -> None:
    """Raise InputError for images below 8x8."""
    _, height, width = image_shape
    if min(height, width) < MIN_IMAGE_SIZE:
        least = f"{MIN_IMAGE_SIZE}x{MIN_IMAGE_SIZE}"
        raise InputError(f"model {name} takes images of at least {least}, got {height}x{width}")


def checked_widths(name: str, widths: Sequence[int] | None, default: tuple[int, ...]) -> tuple[int, ...]:
    """`widths`, or `default`; InputError if there are more or fewer."""
    if widths is None:
        return default
    if len(widths) != len(default):
        raise InputError(f"widths of {name}: got {len(widths)} numbers, expected {len(default)} (as {default})")
    return tuple(widths)
