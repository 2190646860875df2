"""From a file or the folder of a run to a network."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flatprune.errors import InputError
from flatprune.export import safetensors_file
from flatprune.export.any_model import load_into
from flatprune.export.model_file import MODEL_FILE, read_model
from flatprune.export.saved import SavedNetwork
from flatprune.files.atomic import read_bytes
from flatprune.files.finished import DIGESTS_FILE, SUMMARY_FILE, check_digest


def load(
    path: str | os.PathLike[str], device: torch.device | str = "cpu", *, into: nn.Module | None = None
) -> nn.Module:
    """The network of a finished run, or one that `flatprune.save` wrote, in evaluation mode.

    Args:
        path: folder of the run, a `model.pt`, or a `.safetensors` that `flatprune export` made; with `into` a file of
            `flatprune.save`.
        device: where its tensors go.
        into: a network of the class that was saved, built as it was before pruning; changed in place and returned. With
            it the folder of a run of a network of one's own (`--model module:function`) is loaded, too.

    Returns:
        An ordinary `nn.Module` in its pruned shapes. Of a run, `model.normalization` maps images to its input,
        `model.image_shape` is (channels, height, width) of that input, `model.classes` the number of its outputs.

    Raises:
        InputError: there is no such file, or it holds something else.
        DamagedError: it is not what was written, or, in the folder of a run, not the network of that run.

    Example:
        >>> model = flatprune.load("runs/demo")
        >>> classes = model(model.normalization(images)).argmax(1)  # uint8 images [n, height, width, channels]
    """
    if into is not None and not Path(path).is_dir():
        return load_into(into, path).to(device)
    saved = read_saved(path)
    model = (saved.network() if into is None else saved.fill(into).eval()).to(device)
    told = {
        "normalization": saved.normalization,
        "image_shape": saved.image_shape,
        "classes": saved.arguments["classes"],
    }
    for name, value in told.items():
        if not hasattr(model, name):  # as a class of the user's may
            setattr(model, name, value)
    return model


def read_saved(path: str | os.PathLike[str]) -> SavedNetwork:
    """What `load` makes a network of, on the CPU; errors are the same."""
    folder = Path(path)
    if folder.is_dir():
        saved = read_model(folder / MODEL_FILE)
        if all((folder / name).is_file() for name in (DIGESTS_FILE, SUMMARY_FILE)):
            check_digest(folder, MODEL_FILE, read_bytes(saved.path))
        return saved
    return (safetensors_file.read if folder.suffix == safetensors_file.SUFFIX else read_model)(folder)


def fresh_network(path: str | os.PathLike[str], arguments: Mapping[str, Any]) -> nn.Module:
    """The architecture of a finished run with fresh initial values, as its modules draw them.

    Parameters of a module without `reset_parameters` are those that it begins with in the unpruned network, cut off.

    Args:
        path: folder of the run, or a `model.pt`.
        arguments: image_shape and classes it is to be used with.

    Raises:
        InputError: there is no such file, or it is for other images.
    """
    saved = read_saved(path)
    model = load(path).train()
    for name in ("image_shape", "classes"):
        wanted, found = arguments[name], getattr(model, name)
        if (list(found) if name == "image_shape" else found) != wanted:
            raise InputError(f"architecture_of {path}: its {name} is {found}, expected {wanted}")
    left: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if callable(getattr(module, "reset_parameters", None)):
            module.reset_parameters()  # type: ignore[operator]
        else:
            left |= module.named_parameters(name, recurse=False)
    if left:
        whole = saved.drawn()
        with torch.no_grad():
            for name, parameter in left.items():
                parameter.copy_(whole.get_parameter(name)[tuple(map(slice, parameter.shape))])
    return model
