"""What a network of the full size has to become before it can take the tensors of a pruned one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from flatprune.errors import InputError
from flatprune.export.any_model import held_values
from flatprune.export.saved import take_tensors

FORMAT, VERSION = "flatprune-shapes", 1


def shapes_of(model: nn.Module) -> dict[str, Any]:
    """Shapes of all tensors, and the numbers that its modules hold."""
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    return {"format": FORMAT, "version": VERSION, "shapes": shapes, "attributes": held_values(model)}


def take_shapes(model: nn.Module, saved: Mapping[str, Any], where: str) -> None:
    """Give a network of the full size the shapes that `shapes_of` has noted; its tensors are zero then.

    Args:
        model: as it was built before pruning; changed in place.
        saved: what was noted.
        where: the file, for errors.

    Raises:
        InputError: of another format, or of another network.
    """
    if (found := (saved.get("format"), saved.get("version"))) != (FORMAT, VERSION):
        raise InputError(f"{where}: format and version are {found}, expected {(FORMAT, VERSION)}")
    own = model.state_dict()
    zeros = {
        name: torch.zeros(shape, dtype=own[name].dtype if name in own else None)
        for name, shape in saved["shapes"].items()
    }
    take_tensors(model, zeros, attributes=saved["attributes"])
