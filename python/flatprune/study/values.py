"""Values from a study file as `Settings` takes them, checked by the types that its fields are declared with."""

from __future__ import annotations

import difflib
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Any

from flatprune.errors import InputError
from flatprune.settings import Settings

_HINTS = typing.get_type_hints(Settings)
_FLOATS = 2**1023  # above, an integer is no float
_SHOWN = 120  # characters
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = _SHOWN
_KINDS = {str: "a word", int: "a whole number", float: "a number", bool: "true or false (or on, off)"}


def field_value(where: str, name: str, value: Any) -> Any:
    """`value` as the field `name` of `Settings` holds it.

    Raises:
        InputError: there is no such field, or it takes another type; `where` begins the message.
    """
    if name not in _HINTS:
        name = str(name)
        near = difflib.get_close_matches(name, _HINTS, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(_HINTS)}"
        raise InputError(f"{where}: there is no setting {shown(name)}; {hint}")
    kinds = _kinds(_HINTS[name])
    for kind in kinds:
        converted = _as(kind, value)
        if converted is not None or (value is None and kind is types.NoneType):
            return converted
    wanted = " or ".join("nothing" if kind is types.NoneType else _name_of(kind) for kind in kinds)
    raise InputError(f"{where}: {name} is {shown(value)}, expected {wanted}")


def field_values(where: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """`field_value` of every entry."""
    return {name: field_value(where, name, value) for name, value in values.items()}


def label(value: Any) -> str:
    """A value in a few letters, for tables."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (list, tuple)):
        return "-".join(str(item) for item in value)
    if isinstance(value, float):
        return f"{value:g}"
    return "default" if value is None else str(value)


def shown(value: Any) -> str:
    """A value in an error message: its repr, cut off where it is long."""
    text = _REPR.repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _kinds(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _name_of(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return f"a list, of {_KINDS[typing.get_args(kind)[0]]} each"
    return _KINDS.get(kind, str(kind))


def _as(kind: Any, value: Any) -> Any:
    """The value as this type, or None if it is of another."""
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        items = [_as(inner, item) for item in value] if isinstance(value, list) else [None]
        return None if None in items else tuple(items)
    if kind is bool:
        return {True: True, False: False, "on": True, "off": False}.get(value) if _plain(value) else None
    if kind is str and isinstance(value, bool):
        return "on" if value else "off"
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < _FLOATS else None
    if kind is int and isinstance(value, bool):
        return None
    return value if kind is not types.NoneType and isinstance(value, kind) else None


def _plain(value: Any) -> bool:
    return isinstance(value, (bool, str))
