"""`model.pt`, the pruned network as a run leaves it.

A dict of plain values and tensors (`torch.load(weights_only=True)` reads it), sealed as `flatprune.files.sealed` says:

    format          "flatprune-model"
    version         2
    model           name and arguments of `flatprune.models.build`
    widths          layer name -> output channels or features, after pruning
    normalization   mean, std [channels], image_size: what to do to images first
    state_dict      the tensors, in their pruned shapes
    attributes      of a network of the user's own class alone: numbers that its modules hold (see `flatprune.save`)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from flatprune import models, named
from flatprune.data import Normalization
from flatprune.export.any_model import held_values
from flatprune.export.saved import SavedNetwork, saved_network
from flatprune.files.sealed import load_sealed, save_sealed

MODEL_FILE = "model.pt"
MODEL_FORMAT = "flatprune-model"
MODEL_VERSION = 2


def save_model(
    path: str | os.PathLike[str], model: nn.Module, arguments: Mapping[str, Any], normalization: Normalization
) -> None:
    """Write `model` to `path`, atomically.

    Args:
        path: of the file.
        model: a network made by `flatprune.models.build(**arguments)`, of any widths since.
        arguments: name, image_shape, classes and widths it was built with.
        normalization: what its images go through first.
    """
    state = {
        "format": MODEL_FORMAT,
        "version": MODEL_VERSION,
        "model": dict(arguments),
        "widths": models.layer_widths(model),
        "normalization": normalization.state_dict(),
        "state_dict": {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()},
    }
    if named.is_named(arguments["name"]):
        state["attributes"] = held_values(model)
    save_sealed(path, state)


def read_model(path: Path) -> SavedNetwork:
    """The content of a `model.pt`, on the CPU.

    Raises:
        InputError: there is no such file, or it holds something else.
        DamagedError: it is not what was written.
    """
    state = load_sealed(path, MODEL_FORMAT, MODEL_VERSION)
    return saved_network(path, state, lambda values: Normalization(**values), lambda: state["state_dict"])
