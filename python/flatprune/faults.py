"""What pydantic finds wrong with the values of a model, in one line of our words."""

from __future__ import annotations

import reprlib
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from flatprune.errors import did_you_mean

_LONGEST = 120  # characters of a value
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = _LONGEST
_BOUNDS = {"gt": "a number above {}", "ge": "{} or more", "lt": "below {}", "le": "at most {}"}
_KINDS = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a number",
    "bool_type": "true or false",
    "is_instance_of": "a word",
    "tuple_type": "a list",
}


def first_fault(error: ValidationError, fields: dict[str, FieldInfo]) -> str:
    """One line about the first fault of an error, with the field, its value and what is wanted.

    Args:
        error: of the model that has these fields.
        fields: name -> declaration.

    Example:
        >>> first_fault(error, Settings.model_fields)
        'epochs is 0, expected 1 or more'
    """
    fault = error.errors(include_url=False)[0]
    if fault["type"] == "value_error":  # what a validator of the model raised
        return str(fault["ctx"]["error"])
    name, *place = map(str, fault["loc"])
    if name not in fields:
        return f"there is no setting {shown(name)}; {did_you_mean(name, fields)}"
    subject = f"{name} {'has' if place else 'is'} {shown(fault['input'])}"
    if (known := choices(fields[name])) and isinstance(fault["input"], str):
        return f"{subject}; {did_you_mean(fault['input'], known)}"
    return f"{subject}, expected {_wanted(fault, fields[name])}"


def choices(field: FieldInfo) -> tuple[str, ...]:
    """The words that a field takes; () where it is no choice."""
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else ()


def shown(value: Any) -> str:
    """A value in an error message: its repr, cut off where it is long."""
    text = _REPR.repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _wanted(fault: ErrorDetails, field: FieldInfo) -> str:
    context = fault.get("ctx", {})
    broken = {key: context[key] for key in _BOUNDS if key in context}
    if fault["type"] == "finite_number" or any(isinstance(bound, float) for bound in broken.values()):  # its range
        broken = {key: getattr(item, key) for key in _BOUNDS for item in field.metadata if hasattr(item, key)}
    if broken:
        return " and ".join(_BOUNDS[key].format(bound) for key, bound in broken.items())
    kind = f"one of {', '.join(choices(field))}" if choices(field) else _KINDS.get(fault["type"], fault["msg"])
    return f"{kind} or nothing" if NoneType in get_args(field.annotation) and len(fault["loc"]) == 1 else kind
