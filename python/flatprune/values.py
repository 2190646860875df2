"""Values from a YAML file as `Settings` takes them, and as tables show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flatprune.errors import InputError
from flatprune.settings import Settings

_WORDS = {"on": True, "off": False}


def field_value(where: str, name: str, value: Any) -> Any:
    """`value` as the field `name` of `Settings` holds it; on and off are words or switches, as the field is.

    Raises:
        InputError: there is no such field, or it takes another type or range; `where` begins the message.
    """
    field = Settings.model_fields.get(name)
    if field is not None and field.annotation is bool and isinstance(value, str):
        value = _WORDS.get(value, value)
    elif field is not None and field.annotation is not bool and isinstance(value, bool):
        value = "on" if value else "off"
    try:
        return Settings.value(str(name), value)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


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
