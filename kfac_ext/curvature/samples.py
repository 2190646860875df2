"""Which dimension of what a layer sees counts samples: the first, unless the sizes or the user say otherwise."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping

import torch

from kfac_ext.curvature.capture import Capture
from kfac_ext.layers import Layer

Probe = Callable[[], Mapping[str, torch.Size]]


class BatchDims:
    """Where the samples stand in the inputs of layers, call by call.

    A dimension is the samples' if its size is N and no other's is. Where several are of that size, what was found of
    the layer before holds; else one forward with a sample fewer tells. Sizes say nothing of layers that see rows of
    another number: what 'reduce' does to these is said once.

    Args:
        given: regular expression of layer names -> dimension.

    Attributes:
        found: layer -> dimension, as sizes have told it.
    """

    def __init__(self, given: Mapping[str, int] | None = None) -> None:
        self._given = [(re.compile(pattern), dim) for pattern, dim in (given or {}).items()]
        self.found: dict[str, int] = {}
        self._is_warned = False

    def place_(self, capture: Capture, layers: Mapping[str, Layer], probe: Probe | None) -> None:
        """Set `capture.batch_dims`.

        Args:
            capture: a forward of `capture.samples` samples.
            layers: by name.
            probe: shapes of each layer's input in a forward with one sample fewer, of those where it can be told;
                None: nothing depends on it that must be said.
        """
        unknown: list[str] = []
        shorter: Mapping[str, torch.Size] | None = None
        for name in capture.names:
            layer, given = layers[name], self._given_to(name)
            dims = []
            for shape in capture.shapes(name):
                fitting = [d for d in _candidates(layer, shape) if shape[d] == capture.samples]
                if given is not None:
                    fitting = [given]
                elif probe is not None and len(fitting) > 1 and name not in self.found and capture.samples > 1:
                    shorter = probe() if shorter is None else shorter
                    fitting = [d for d in fitting if name in shorter and shorter[name][d] != shape[d]] or fitting
                if len(fitting) == 1:
                    self.found[name] = fitting[0]
                elif not fitting:
                    unknown.append(name)
                dims.append(fitting[0] if len(fitting) == 1 else self.found.get(name, 0) if fitting else 0)
            if any(dims):
                capture.batch_dims[name] = dims
        if unknown and probe is not None and not self._is_warned:
            self._is_warned = True
            listed = ", ".join(map(repr, dict.fromkeys(unknown)))
            warnings.warn(
                f"Curvature: {listed} see rows that are not the {capture.samples} samples, so that positions are not "
                "told from samples: each row counts as a sample. layer_batch_dims={name: dimension} says where the "
                "samples are; kfac_approx='expand' need not know",
                stacklevel=2,
            )

    def _given_to(self, name: str) -> int | None:
        return next((dim for pattern, dim in self._given if pattern.search(name)), None)


def _candidates(layer: Layer, shape: torch.Size) -> range:
    return range(1) if layer.is_convolution else range(max(len(shape) - 1, 1))
