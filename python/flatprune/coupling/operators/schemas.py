"""What an operator says of itself, looked up once since torch makes it anew each time; the tensors of its arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


class Schema(NamedTuple):
    """An operator's schema.

    Attributes:
        called: its name, without overload.
        name: the same without the underscore of an in-place variant, as the table of rules has it.
        in_place: whether it is one.
        arguments: name -> (position, its default alone or nothing).
        written: names of arguments that it writes to.
        is_view: whether its result is a view of an argument.
        aliases: whether a result is, or is an argument itself.
        random: whether it draws random numbers.
        host: whether its result depends on values in a way that Python code sees.
        pointwise: whether it is elementwise.
    """

    called: str
    name: str
    in_place: bool
    arguments: dict[str, tuple[int, tuple[Any, ...]]]
    written: tuple[str, ...]
    is_view: bool
    aliases: bool
    random: bool
    host: bool
    pointwise: bool


@cache
def schema_of(func: Any) -> Schema:
    """The schema of an ATen operator.

    Example:
        >>> schema_of(torch.ops.aten.add_.Tensor).name
        'add'
    """
    called = func._schema.name.split("::")[1]
    in_place = called.endswith("_") and not called.startswith("__")
    arguments = func._schema.arguments
    return Schema(
        called,
        called[:-1] if in_place else called,
        in_place,
        {a.name: (i, (a.default_value,) if a.has_default_value() else ()) for i, a in enumerate(arguments)},
        tuple(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write),
        func.is_view,
        any(result.alias_info is not None for result in func._schema.returns),
        torch.Tag.nondeterministic_seeded in func.tags,
        torch.Tag.data_dependent_output in func.tags,
        torch.Tag.pointwise in func.tags,
    )


def tensors_in(arguments: Any) -> list[Tensor]:
    """All tensors among arguments or results, nested ones too, in order."""
    found: list[Tensor] = []
    _gather(arguments, found)
    return found


def _gather(item: Any, found: list[Tensor]) -> None:
    if isinstance(item, Tensor):
        found.append(item)
    elif type(item) in (tuple, list):
        if item and type(item[0]) is not int:  # sizes
            for part in item:
                _gather(part, found)
    elif type(item) is dict:
        for part in item.values():
            _gather(part, found)
    elif isinstance(item, tuple):  # a named one
        found += [leaf for leaf in tree_leaves(item) if isinstance(leaf, Tensor)]


def mapped(change: Callable[[Tensor], Tensor], item: Any) -> Any:
    """Arguments or results of an operator with every tensor changed."""
    if isinstance(item, Tensor):
        return change(item)
    if type(item) is tuple:
        return tuple([mapped(change, part) for part in item])
    if type(item) is list:
        return [mapped(change, part) for part in item] if item and type(item[0]) is not int else item
    if type(item) is dict:
        return {key: mapped(change, part) for key, part in item.items()}
    return tree_map_only(Tensor, change, item) if isinstance(item, tuple) else item
