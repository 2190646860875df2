"""The pruned network as a safetensors file, which any reader of that format opens.

The tensors are the state dict in its pruned shapes. The header's metadata has `format` "pt", as readers expect of
PyTorch tensors, `flatprune`, the JSON of `flatprune.export.subject.Subject.description`: all that
`flatprune.load` needs beside the tensors, and `flatprune_sha256`, the digest of both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatprune.data import Normalization
from flatprune.errors import InputError
from flatprune.export.saved import SavedNetwork, saved_network
from flatprune.export.subject import DESCRIPTION_FORMAT, DESCRIPTION_KEY, DESCRIPTION_VERSION, NORMALIZED, Subject
from flatprune.extras import needed_by
from flatprune.files.atomic import damaged

SUFFIX = ".safetensors"
DIGEST_KEY = f"{DESCRIPTION_KEY}_sha256"


def write(subject: Subject, path: Path) -> list[Path]:
    """Write tensors and description to `path`; raises InputError for an input that a file of tensors cannot have."""
    with needed_by("export to safetensors"):
        from safetensors.torch import save
    if subject.input != NORMALIZED:
        raise InputError(
            f"input is {subject.input!r}: a safetensors file holds tensors and no computation, so it takes "
            f"{NORMALIZED!r} only; the normalization is in its metadata"
        )
    if subject.saved.is_own:
        raise InputError(
            f"to safetensors: model {subject.saved.arguments['name']} is a class of your own, which a file of tensors "
            "cannot be made to a network without; flatprune.load(DIR, into=...) gives the network"
        )
    tensors = {name: tensor.contiguous() for name, tensor in subject.network.state_dict().items()}
    description = json.dumps(subject.description())
    metadata = {"format": "pt", DESCRIPTION_KEY: description, DIGEST_KEY: _digest(description, tensors)}
    path.write_bytes(save(tensors, metadata))
    return [path]


def read(path: Path) -> SavedNetwork:
    """The content of a file that `write` made, on the CPU.

    Raises:
        InputError: there is no such file, or it holds something else.
        DamagedError: it is not what was written.
    """
    with needed_by(f"{path}: a safetensors file"):
        from safetensors import safe_open
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except Exception as error:  # of a class of its own for each kind of damage
        raise damaged(path, error) from error
    description = _checked(path, metadata)
    if metadata.get(DIGEST_KEY) != _digest(metadata[DESCRIPTION_KEY], tensors):
        raise damaged(path, "its tensors and description do not have the SHA-256 in its metadata")

    def normalization(values: Mapping[str, Any]) -> Normalization:
        mean, std = (torch.tensor(values[name]) for name in ("mean", "std"))
        return Normalization(mean, std, values["image_size"])

    return saved_network(path, description, normalization, lambda: tensors)


def check(path: Path) -> None:
    """Raise DamagedError where a file is not what `write` wrote."""
    read(path)


def reopen(path: Path) -> Callable[[Tensor], Tensor]:
    """What the file computes, rebuilt from it alone."""
    return read(path).network()


def _checked(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    try:
        description = json.loads(metadata.get(DESCRIPTION_KEY, "{}"))
    except (ValueError, RecursionError):
        description = None
    if not isinstance(description, dict) or description.get("format") != DESCRIPTION_FORMAT:
        raise InputError(
            f"{path}: its metadata does not describe a network of flatprune, "
            f"expected {DESCRIPTION_KEY} with format {DESCRIPTION_FORMAT!r}"
        )
    if description.get("version") != DESCRIPTION_VERSION:
        found = description.get("version")
        raise InputError(f"{path}: version {found!r:.80}, this package reads {DESCRIPTION_VERSION}")
    return description


def _digest(description: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the description and of every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(description.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name!r} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
