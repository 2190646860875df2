"""A pruned network of a user's own class in a file: its tensors, and the numbers that its modules hold."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn

from flatprune.coupling.attributes import integers
from flatprune.errors import InputError
from flatprune.export.saved import take_tensors
from flatprune.files.sealed import load_sealed, save_sealed

FORMAT, VERSION = "flatprune tensors", 1


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a pruned network of any class, for `flatprune.load(path, into=...)`.

    The file holds the state dict, buffers that it leaves out, and every integer that a module has as an attribute or in
    a tuple, list or dict of plain values, widths and numbers of heads among them. It holds no code.

    Args:
        model: the network; a wrapper such as `DistributedDataParallel` is to be left out.
        path: of the file.

    Raises:
        OSError: it cannot be written.

    Example:
        >>> flatprune.save(model, "small.pt")
        >>> again = flatprune.load("small.pt", into=MyNetwork())
    """
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    content = {"class": kind, "tensors": model.state_dict(), "attributes": held_values(model)}
    save_sealed(path, {"format": FORMAT, "version": VERSION, **content})


def held_values(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Module -> attribute -> value, of what a fresh network needs beside the state dict of a pruned one."""
    held: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        found = integers(module, least=1)  # pruning may have left one head
        own = {key: vars(module)[key] for key, _, _ in found if _is_plain(vars(module)[key])}
        unsaved = module._non_persistent_buffers_set & module._buffers.keys()
        own |= {key: module._buffers[key] for key in sorted(unsaved)}
        if own:
            held[name] = own
    return held


def load_into(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Make a network, built as it was before pruning, the one that `save` wrote; returns it in evaluation mode.

    Raises:
        InputError: there is no such file, or it is of another network.
        DamagedError: it is not what was written.
    """
    saved = load_sealed(path, FORMAT, VERSION)
    modules = dict(model.named_modules())
    if unknown := [name for name in saved["attributes"] if name not in modules]:
        raise InputError(f"{path}: of a {saved['class']} with a module {unknown[0]!r}, which the model given has not")
    try:
        take_tensors(model, saved["tensors"], attributes=saved["attributes"])
    except InputError as error:
        raise InputError(f"{path}: of a {saved['class']}: {error}") from error
    return model.eval()


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, (str, int)) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple) and all(map(_is_plain, value))
    return value is None or (isinstance(value, (int, float, str)) and not isinstance(value, Tensor))
