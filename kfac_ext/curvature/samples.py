"""Where samples stand in what a layer sees: the first dimension, unless sizes, a trial or the user say otherwise."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kfac_ext.layers import Layer

Probe = Callable[[], Mapping[str, tuple[Tensor, Tensor]]]


class Layout(NamedTuple):
    """Where the samples of one call stand.

    Attributes:
        dim: the dimension that counts them.
        is_folded: that the first dimension holds samples and positions, [N P, ...] (dim 0) or [P N, ...] (dim 1).
    """

    dim: int = 0
    is_folded: bool = False

    def samples_first(self, tensor: Tensor, samples: int) -> Tensor:
        """The tensor as [N, ...]."""
        if self.is_folded:
            split = (samples, -1) if self.dim == 0 else (-1, samples)
            tensor = tensor.unflatten(0, split)
        return tensor.movedim(self.dim, 0) if self.dim else tensor

    def spread(self, values: Tensor, like: Tensor) -> Tensor:
        """One value a sample, [N], in a shape that broadcasts over a tensor of this layout."""
        if self.is_folded:
            times = len(like) // len(values)
            rows = values.repeat_interleave(times) if self.dim == 0 else values.repeat(times)
            return rows.view([-1, *[1] * (like.dim() - 1)])
        return values.view([-1 if dim == self.dim else 1 for dim in range(like.dim())])


class Layouts:
    """Where the samples stand in the inputs of layers, found call by call.

    A dimension is the samples' if its size is N and no other's is. Where several are of that size, or the first is a
    multiple of N, two forwards on the newest inputs tell, once a layer, one of them with a sample fewer. What can be
    told in neither way is said once.

    Args:
        given: regular expression of layer names -> dimension.

    Attributes:
        found: layer -> layout, where it is none that sizes alone tell.
    """

    def __init__(self, given: Mapping[str, int] | None = None) -> None:
        for pattern, dim in (given or {}).items():
            if isinstance(dim, bool) or not isinstance(dim, int):
                raise TypeError(f"Curvature: layer_batch_dims[{pattern!r}] is {dim!r}, expected a whole number")
        self._given = [(re.compile(pattern), dim) for pattern, dim in (given or {}).items()]
        self.found: dict[str, Layout] = {}
        self._tried: set[str] = set()
        self._is_warned = False

    def check(self, layers: Iterable[str]) -> None:
        """Raise ValueError if a regular expression matches none of these layers."""
        for pattern, _ in self._given:
            if not any(pattern.search(name) for name in layers):
                raise ValueError(
                    f"Curvature: layer_batch_dims: {pattern.pattern!r} matches none of {', '.join(map(repr, layers))}"
                )

    def of(
        self,
        shapes: Mapping[str, Sequence[torch.Size]],
        samples: int,
        layers: Mapping[str, Layer],
        probe: Probe,
        *,
        warns: bool,
    ) -> dict[str, list[Layout]]:
        """The layout of every call of the layers in which samples are not simply the first dimension.

        Args:
            shapes: layer -> of the input of each call.
            samples: N.
            layers: by name.
            probe: makes the two forwards: layer -> its input in both.
            warns: whether what cannot be told is to be said.
        """
        layouts: dict[str, list[Layout]] = {}
        unknown: list[str] = []
        seen: Mapping[str, tuple[Tensor, Tensor]] | None = None
        for name, calls in shapes.items():
            layer = layers[name]
            if not self._given and all(_is_plain(shape, samples, layer) for shape in calls):
                continue
            for shape in calls:
                options = self._options(name, layer, shape, samples)
                if len(options) > 1 and name in self.found:
                    options = [option for option in options if option == self.found[name]] or options
                if len(options) > 1 and name not in self._tried:
                    self._tried.add(name)
                    seen = probe() if seen is None else seen
                    options = [option for option in options if name in seen and _agrees(option, *seen[name], samples)]
                    if len(options) == 1:
                        self.found[name] = options[0]
                if len(options) != 1:
                    unknown.append(name)
                layouts.setdefault(name, []).append(options[0] if len(options) == 1 else Layout())
        if unknown and warns and not self._is_warned:
            self._is_warned = True
            listed = ", ".join(map(repr, dict.fromkeys(unknown)))
            warnings.warn(
                f"Curvature: it cannot be told which rows of what {listed} see belong to which of {samples} samples; "
                "each counts as a sample. layer_batch_dims={name: dimension} says where the samples are, "
                "kfac_approx='expand' need not know",
                stacklevel=3,
            )
        return {name: found for name, found in layouts.items() if any(layout != Layout() for layout in found)}

    def _options(self, name: str, layer: Layer, shape: torch.Size, samples: int) -> list[Layout]:
        for pattern, dim in self._given:
            if pattern.search(name):
                return [Layout(dim)]
        if layer.is_convolution:
            return [Layout()] if shape[0] == samples else []
        fitting = [Layout(dim) for dim in range(max(len(shape) - 1, 1)) if shape[dim] == samples]
        if shape[0] != samples and shape[0] % samples == 0:
            fitting += [Layout(0, True), Layout(1, True)]
        return fitting[:1] if samples == 1 else fitting


def _is_plain(shape: torch.Size, samples: int, layer: Layer) -> bool:
    """Whether nothing but the first dimension can count the samples: the usual case, decided at once."""
    return shape[0] == samples and (len(shape) == 2 or layer.is_convolution)


def _agrees(layout: Layout, whole: Tensor, shorter: Tensor, samples: int) -> bool:
    """Whether what a layer saw of all samples, without the last, is what it saw of the others."""
    try:
        first = layout.samples_first(whole, samples)[:-1]
        other = layout.samples_first(shorter, samples - 1)
    except RuntimeError:
        return False
    return first.shape == other.shape and torch.allclose(first, other, rtol=1e-3, atol=1e-5)
