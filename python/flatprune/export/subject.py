"""What is exported: a network that takes the input asked for, and its description.

The description travels in every export, as JSON:

    format          "flatprune-network"
    version         2
    model           name, image_shape, classes and widths of `flatprune.models.build`
    widths          layer name -> output channels or features, after pruning
    params          trainable scalars
    normalization   mean, std [channels], image_size: x = (p - mean) / std, p = pixel / 255 for uint8 images
    input           kind (normalized, float or uint8), dtype, shape of one image
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from flatprune import models
from flatprune.data import Normalization
from flatprune.errors import InputError
from flatprune.export.saved import SavedNetwork

DESCRIPTION_FORMAT = "flatprune-network"
DESCRIPTION_VERSION = 2
DESCRIPTION_KEY = "flatprune"  # where formats have named places for such things
NORMALIZED, FLOAT, UINT8 = INPUTS = ("normalized", "float", "uint8")
_SCALES = {
    NORMALIZED: ", (pixels - mean) / std, of uint8 pixels / 255",
    FLOAT: ", uint8 pixels / 255, or floats as trained on",
    UINT8: "",
}


class PixelNetwork(nn.Module):
    """A network behind the normalization of its images."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, normalization: Normalization, white: float) -> None:
        super().__init__()
        self.network = network
        self.white = white
        self.register_buffer("mean", normalization.mean.view(-1, 1, 1))
        self.register_buffer("std", normalization.std.view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, classes] of images [n, height, width, channels]."""
        pixels = images.permute(0, 3, 1, 2).to(torch.float32) / self.white
        return self.network((pixels - self.mean) / self.std)


@dataclass(frozen=True)
class Subject:
    """A saved network and the input it is to take.

    Attributes:
        saved: the network.
        input: "normalized": float32 [n, channels, height, width], as `Normalization` returns it. "float": float32
            [n, height, width, channels], of the scale of the training images (uint8 ones divided by 255).
            "uint8": the same as uint8, divided by 255 inside.

    Raises:
        InputError: `input` is none of these.
    """

    saved: SavedNetwork
    input: str = NORMALIZED

    def __post_init__(self) -> None:
        if self.input not in INPUTS:
            raise InputError(f"input is {self.input!r}, expected one of {', '.join(INPUTS)}")

    @cached_property
    def network(self) -> nn.Module:
        """The module that is exported, in evaluation mode."""
        network = self.saved.network()
        if self.input == NORMALIZED:
            return network
        return PixelNetwork(network, self.saved.normalization, 255.0 if self.input == UINT8 else 1.0).eval()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image as the module takes it."""
        channels, height, width = self.saved.image_shape
        return (channels, height, width) if self.input == NORMALIZED else (height, width, channels)

    def images(self, n: int) -> Tensor:
        """The same `n` random images every time."""
        generator = torch.Generator().manual_seed(n)
        if self.input == UINT8:
            return torch.randint(0, 256, (n, *self.shape), generator=generator, dtype=torch.uint8)
        draw = torch.randn if self.input == NORMALIZED else torch.rand
        return draw(n, *self.shape, generator=generator)

    @property
    def params(self) -> int:
        """Number of trainable scalars."""
        return models.parameter_count(self.network)

    def description(self) -> dict[str, Any]:
        """Plain values, see the head of this file."""
        arguments, normalization = self.saved.arguments, self.saved.normalization
        inner = self.network.network if isinstance(self.network, PixelNetwork) else self.network
        return {
            "format": DESCRIPTION_FORMAT,
            "version": DESCRIPTION_VERSION,
            "model": {**arguments, "image_shape": list(self.saved.image_shape)},
            "widths": models.layer_widths(inner),
            "params": self.params,
            "normalization": {
                "mean": normalization.mean.tolist(),
                "std": normalization.std.tolist(),
                "image_size": normalization.image_size,
            },
            "input": {"kind": self.input, "dtype": self.dtype, "shape": list(self.shape)},
        }

    @property
    def dtype(self) -> str:
        """Of the input."""
        return "uint8" if self.input == UINT8 else "float32"

    def input_text(self) -> str:
        """One line that says what the module takes, as in "uint8 [n, 8, 8, 1]"."""
        shape = ", ".join(str(side) for side in ("n", *self.shape))
        return f"{self.dtype} [{shape}]" + _SCALES[self.input]
