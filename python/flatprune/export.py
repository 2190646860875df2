"""The pruned network as a file, and back.

`model.pt` is a dict of plain values and tensors (`torch.load(weights_only=True)` reads it):

    format          "flatprune-model"
    version         1
    model           name and arguments of `flatprune.models.build`
    widths          layer name -> output channels or features, after pruning
    normalization   mean, std [channels], image_size: what to do to images first
    state_dict      the tensors, in their pruned shapes
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flatprune import models
from flatprune.checkpoint import read_torch_file, save_atomically
from flatprune.data import Normalization
from flatprune.errors import InputError

MODEL_FILE = "model.pt"
MODEL_FORMAT = "flatprune-model"
MODEL_VERSION = 1


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
    save_atomically(path, state)


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> nn.Module:
    """The network of a finished run, in evaluation mode.

    Args:
        path: folder of the run, or a `model.pt`.
        device: where its tensors go.

    Returns:
        An ordinary `nn.Module` in its pruned shapes. `model.normalization` maps images to its input,
        `model.image_shape` is (channels, height, width) of that input, `model.classes` the number of its outputs.

    Raises:
        InputError: there is no such file, or it holds something else.

    Example:
        >>> model = flatprune.load("runs/demo")
        >>> classes = model(model.normalization(images)).argmax(1)  # uint8 images [n, height, width, channels]
    """
    file = Path(path) / MODEL_FILE if Path(path).is_dir() else Path(path)
    state = read_torch_file(file, MODEL_FORMAT, device)
    if state["version"] != MODEL_VERSION:
        raise InputError(f"{file}: model version {state['version']}, this package reads {MODEL_VERSION}")
    model = rebuild(state["model"], state["state_dict"]).to(device).eval()
    model.normalization = Normalization(**state["normalization"])  # type: ignore[assignment]
    model.image_shape = tuple(state["model"]["image_shape"])  # type: ignore[assignment]
    model.classes = state["model"]["classes"]  # type: ignore[assignment]
    return model


def rebuild(arguments: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """Build a network and give it the tensors of a pruned one of the same kind.

    Raises:
        InputError: names of tensors differ.
    """
    rng = torch.get_rng_state()
    model = models.build(arguments["name"], tuple(arguments["image_shape"]), arguments["classes"], arguments["widths"])
    torch.set_rng_state(rng)  # the initial values are thrown away, so they must not cost random numbers
    take_tensors(model, tensors)
    return model


def fresh_network(path: str | os.PathLike[str], arguments: Mapping[str, Any]) -> nn.Module:
    """The architecture of a finished run with fresh initial values, as its modules draw them.

    Args:
        path: folder of the run, or a `model.pt`.
        arguments: image_shape and classes it is to be used with.

    Raises:
        InputError: there is no such file, it is for other images, or a parameter cannot be drawn afresh.
    """
    model = load(path).train()
    for name in ("image_shape", "classes"):
        wanted, found = arguments[name], getattr(model, name)
        if (list(found) if name == "image_shape" else found) != wanted:
            raise InputError(f"architecture_of {path}: its {name} is {found}, expected {wanted}")
    for name, module in model.named_modules():
        if callable(getattr(module, "reset_parameters", None)):
            module.reset_parameters()  # type: ignore[operator]
        elif module._parameters:
            raise InputError(f"architecture_of {path}: {name or 'the network'} has parameters that only it can draw")
    return model


def take_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Replace every parameter and buffer of `model` by a copy of the tensor of that name, whatever its shape."""
    from flatprune.surgery import sync_attributes

    own = model.state_dict(keep_vars=True)
    for name in [*own, *tensors]:
        if (name in own) != (name in tensors):
            where = "the network" if name in own else "the file"
            raise InputError(f"tensor {name!r} is only in {where}; is it a network of another kind?")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.data = tensors[name].detach().clone().to(tensor.device)
    sync_attributes(model)
