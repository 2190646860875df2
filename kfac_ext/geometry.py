"""Geometry of a convolution: what stride, padding and dilation mean in pixels, decided in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import torch

Pair: TypeAlias = "int | Sequence[int]"

_MOST_PIXELS = 2**39  # of an axis with its padding: what kernels count with fits 64 bits (csrc/include/kfac/checked.h)
MOST_NUMBERS = 2**53
"""Of an input, and of positions of all samples: as many as float64 counts."""
_MOST_ENTRIES = 2**28 - 1, 2**40  # of a patch, and of those of all groups


_Function = TypeVar("_Function", bound=Callable[..., Any])


def remembered(function: _Function) -> _Function:
    """Layers see the same shapes at every step: what follows from them is found once; for symbolic sizes each time."""
    cached = lru_cache(maxsize=4096)(function)

    @wraps(function)
    def found(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():  # which traces through caches, with a warning
            return function(*arguments)
        try:
            return cached(*arguments)
        except TypeError:  # symbolic sizes have no hash
            return function(*arguments)

    return cast(_Function, found)


class ConvGeometry(NamedTuple):
    """A 2-D convolution over images of one size; every pair is (vertical, horizontal)."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    """left, right, top, bottom: the order of `torch.nn.functional.pad`"""
    dilation: tuple[int, int]
    output_size: tuple[int, int]
    groups: int

    def patch_size(self, channels: int) -> int:
        """Entries of one group's patch, without the bias: C/groups kh kw."""
        return channels // self.groups * self.kernel_size[0] * self.kernel_size[1]


def pair(value: Pair, name: str) -> tuple[int, int]:
    """`value` as two ints; raises ValueError naming `name`."""
    if type(value) is int:  # by far the most frequent, and asked for every layer of every step
        return value, value
    items = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else ()
    if len(items) != 2 or not all(is_int(item) for item in items):
        raise ValueError(f"{name} is {value!r}, expected an int or two ints")
    return items  # type: ignore[return-value]


def is_int(value: object) -> bool:
    """Whether it is an int and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def conv_geometry(
    shape: Sequence[int], kernel_size: Pair, stride: Pair, padding: Pair | str, dilation: Pair, groups: int
) -> ConvGeometry:
    """Resolve the arguments of a `torch.nn.Conv2d` for an input [N, C, H, W] of this shape.

    Raises:
        ValueError: naming the argument, what was given and what is wanted.
    """
    if len(shape) != 4:
        raise ValueError(f"input has {len(shape)} dimensions {tuple(shape)}, expected 4: [N, C, H, W]")
    if not is_int(groups):
        raise ValueError(f"groups is {groups!r}, expected a divisor of the {shape[1]} input channels")
    pairs = pair(kernel_size, "kernel_size"), pair(stride, "stride"), pair(dilation, "dilation")
    return _resolved(tuple(shape), *pairs, padding if isinstance(padding, str) else pair(padding, "padding"), groups)


@remembered
def _resolved(
    shape: tuple[int, ...],
    kernel: tuple[int, int],
    step: tuple[int, int],
    spread: tuple[int, int],
    padding: tuple[int, int] | str,
    groups: int,
) -> ConvGeometry:
    for name, values in (("kernel_size", kernel), ("stride", step), ("dilation", spread)):
        if min(values) < 1:
            raise ValueError(f"{name} is {values}, expected values >= 1")
    if groups < 1 or shape[1] % groups:
        raise ValueError(f"groups is {groups!r}, expected a divisor of the {shape[1]} input channels")
    reach = tuple((k - 1) * d for k, d in zip(kernel, spread))
    before, after = _named_padding(padding, reach, step) if isinstance(padding, str) else (padding, padding)
    if min(before) < 0:
        raise ValueError(f"padding is {before}, expected values >= 0")
    if max(size + b + a for size, b, a in zip(shape[2:], before, after)) > _MOST_PIXELS:
        raise ValueError(f"padding is {padding!r}, expected at most {_MOST_PIXELS} pixels in height and width")
    output = tuple((size + b + a - r - 1) // s + 1 for size, b, a, r, s in zip(shape[2:], before, after, reach, step))
    if min(output) < 1:
        raise ValueError(f"kernel_size {kernel} with dilation {spread} exceeds the padded input of {shape[2:]} pixels")
    _check_counts(shape, kernel, output, groups)
    # a stride beyond the last pixel leaves one output, dilation means nothing to one kernel position: small numbers do
    rooms = [size + b + a - r for size, b, a, r in zip(shape[2:], before, after, reach)]
    step = (min(step[0], rooms[0]), min(step[1], rooms[1]))
    spread = (spread[0] if kernel[0] > 1 else 1, spread[1] if kernel[1] > 1 else 1)
    return ConvGeometry(
        kernel, step, (before[1], after[1], before[0], after[0]), spread, (output[0], output[1]), groups
    )


def _check_counts(shape: Sequence[int], kernel: tuple[int, int], output: Sequence[int], groups: int) -> None:
    """Raise where a kernel could not count what the convolution has."""
    rows, entries = shape[0] * output[0] * output[1], shape[1] * kernel[0] * kernel[1]
    if rows > MOST_NUMBERS:
        raise ValueError(f"padding, stride and dilation give {rows} output positions, expected at most 2**53")
    if entries > _MOST_ENTRIES[1] or entries // groups > _MOST_ENTRIES[0]:
        raise ValueError(f"kernel_size {kernel} gives a patch of {entries // groups} entries, expected less than 2**28")


def padded_geometry(
    shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> ConvGeometry:
    """The geometry from lists as operators have them, padding as (left, right, top, bottom)."""
    if len(padding) != 4 or min(padding) < 0:
        raise ValueError(f"padding is {list(padding)}, expected four values >= 0: left, right, top, bottom")
    if len(shape) != 4:
        raise ValueError(f"input has {len(shape)} dimensions {tuple(shape)}, expected 4: [N, C, H, W]")
    left, right, top, bottom = padding
    padded = (*shape[:2], shape[2] + top + bottom, shape[3] + left + right)
    return conv_geometry(padded, kernel_size, stride, 0, dilation, groups)._replace(padding=(left, right, top, bottom))


def _named_padding(
    padding: str, reach: tuple[int, ...], stride: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding != "same":
        raise ValueError(f"padding is {padding!r}, expected ints, 'same' or 'valid'")
    if stride != (1, 1):
        raise ValueError(f"padding='same' needs stride 1, got {stride}")
    before = (reach[0] // 2, reach[1] // 2)  # torch puts the odd pixel at the end
    return before, (reach[0] - before[0], reach[1] - before[1])


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype factors of inputs of this dtype are summed and stored in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
