"""The pruned network as a safetensors file, which any reader of that format opens.

The tensors are the state dict in its pruned shapes. The header's metadata has `format` "pt", as readers expect of
PyTorch tensors, and `flatprune`, the JSON of `flatprune.export.subject.Subject.description`: all that
`flatprune.load` needs beside the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatprune.data import Normalization
from flatprune.errors import InputError
from flatprune.export.saved import SavedNetwork
from flatprune.export.subject import DESCRIPTION_FORMAT, DESCRIPTION_KEY, DESCRIPTION_VERSION, NORMALIZED, Subject

SUFFIX = ".safetensors"


def write(subject: Subject, path: Path) -> list[Path]:
    """Write tensors and description to `path`; raises InputError for an input that a file of tensors cannot have."""
    from safetensors.torch import save

    if subject.input != NORMALIZED:
        raise InputError(
            f"input is {subject.input!r}: a safetensors file holds tensors and no computation, so it takes "
            f"{NORMALIZED!r} only; the normalization is in its metadata"
        )
    tensors = {name: tensor.contiguous() for name, tensor in subject.network.state_dict().items()}
    path.write_bytes(save(tensors, {"format": "pt", DESCRIPTION_KEY: json.dumps(subject.description())}))
    return [path]


def read(path: Path, device: torch.device | str) -> SavedNetwork:
    """The content of a file that `write` made.

    Raises:
        InputError: there is no such file, it is damaged, or it holds something else.
    """
    from safetensors import safe_open

    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except Exception as error:  # of a class of its own for each kind of damage
        raise InputError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error
    description = _checked(path, metadata)
    normalization = description["normalization"]
    mean, std = (torch.tensor(normalization[name], device=device) for name in ("mean", "std"))
    return SavedNetwork(description["model"], Normalization(mean, std, normalization["image_size"]), tensors)


def reopen(path: Path) -> Callable[[Tensor], Tensor]:
    """What the file computes, rebuilt from it alone."""
    return read(path, "cpu").network()


def _checked(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    try:
        description = json.loads(metadata.get(DESCRIPTION_KEY, "{}"))
    except ValueError:
        description = None
    if not isinstance(description, dict) or description.get("format") != DESCRIPTION_FORMAT:
        raise InputError(
            f"{path}: its metadata does not describe a network of flatprune, "
            f"expected {DESCRIPTION_KEY} with format {DESCRIPTION_FORMAT!r}"
        )
    if description["version"] != DESCRIPTION_VERSION:
        raise InputError(f"{path}: version {description['version']}, this package reads {DESCRIPTION_VERSION}")
    return description
