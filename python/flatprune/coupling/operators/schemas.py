"""What an operator says of itself, looked up once: `torch` makes it anew each time it is asked."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch


class Schema(NamedTuple):
    """An operator's schema.

    Attributes:
        called: its name, without overload.
        name: the same without the underscore of an in-place variant, as the table of rules has it.
        in_place: whether it is one.
        arguments: name -> (position, default or None).
        written: names of arguments that it writes to.
        is_view: whether its result is a view of an argument.
        random: whether it draws random numbers.
        host: whether its result depends on values in a way that Python code sees.
        pointwise: whether it is elementwise.
    """

    called: str
    name: str
    in_place: bool
    arguments: dict[str, tuple[int, Any]]
    written: tuple[str, ...]
    is_view: bool
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
        {a.name: (i, a.default_value if a.has_default_value() else None) for i, a in enumerate(arguments)},
        tuple(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write),
        func.is_view,
        torch.Tag.nondeterministic_seeded in func.tags,
        torch.Tag.data_dependent_output in func.tags,
        torch.Tag.pointwise in func.tags,
    )
