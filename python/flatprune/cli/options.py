"""The options of the command line that are settings: made of the fields of `flatprune.Settings`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from flatprune import models
from flatprune.errors import InputError
from flatprune.faults import choices
from flatprune.settings import Settings
from flatprune.values import label

_Command = TypeVar("_Command", bound=Callable[..., Any])
_NAMES = re.compile(r"\b[a-z]+(?:_[a-z]+)+\b")


def with_settings(command: _Command) -> _Command:
    """Give a command an option for each setting, in the place of its `**given`; those not on the line are None.

    Example:
        >>> @with_settings
        ... def run(out: Path, **given: Any) -> None: ...
    """
    signature = inspect.signature(command, eval_str=True)
    *own, _ = signature.parameters.values()
    fields = Settings.model_fields.items()
    made = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(name, field))
        for name, field in fields
    ]
    own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    command.__signature__ = signature.replace(parameters=[*made, *own])  # type: ignore[attr-defined]
    return command


def settings_of(given: dict[str, Any]) -> dict[str, Any]:
    """The settings that stand on the line, as `Settings` takes them."""
    return {
        name: _parts(name, value) if _is_list(Settings.model_fields[name]) else value
        for name, value in given.items()
        if value is not None
    }


def key_values(option: str, given: list[str] | None) -> dict[str, str]:
    """What KEY=VALUE options say; InputError where one is none."""
    parts = [text.partition("=") for text in given or []]
    for key, equals, value in parts:
        if not key or not equals or not value:
            raise InputError(f"{option} is {key}{equals}{value}, expected KEY=VALUE")
    return {key: value for key, _, value in parts}


def default_of(field: FieldInfo) -> str:
    """What a setting is if it is not given, in words."""
    return label(field.default) if field.default is not None else _extra(field)["unset"]


def panel_of(field: FieldInfo) -> str:
    """The heading that a setting stands under."""
    return _extra(field)["panel"]


def options_of(name: str, field: FieldInfo) -> str:
    """How the option of a setting is written."""
    option = f"--{name.replace('_', '-')}"
    return f"{option}/--no-{option[2:]}" if field.annotation is bool else option


def help_of(field: FieldInfo) -> str:
    """What a setting does, in words of the command line."""
    return _NAMES.sub(_as_option, str(field.description))


def _as_option(word: re.Match[str]) -> str:
    return f"--{word[0].replace('_', '-')}" if word[0] in Settings.model_fields else word[0]


def _annotation(name: str, field: FieldInfo) -> Any:
    kind = str if _is_list(field) or choices(field) else _plain(field.annotation)
    known = models.names() if name == "model" else choices(field)
    option = typer.Option(
        options_of(name, field),
        help=f"{help_of(field)}{_default_text(field)}",
        metavar=_metavar(field),
        rich_help_panel=panel_of(field),
        autocompletion=(lambda: list(known)) if known else None,
    )
    return Annotated[kind | None, option]


def _default_text(field: FieldInfo) -> str:
    return f" [{default_of(field)}]" if field.annotation is not bool and default_of(field) else ""


def _metavar(field: FieldInfo) -> str | None:
    kinds = {bool: None, int: "INT", float: "NUM"}
    return "A,B,..." if _is_list(field) else "NAME" if choices(field) else kinds.get(_plain(field.annotation), "TEXT")


def _extra(field: FieldInfo) -> dict[str, Any]:
    assert isinstance(field.json_schema_extra, dict)
    return field.json_schema_extra


def _plain(annotation: Any) -> Any:
    """The type below what may be None and what carries bounds."""
    if NoneType in get_args(annotation):
        annotation = next(part for part in get_args(annotation) if part is not NoneType)
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _is_list(field: FieldInfo) -> bool:
    return get_origin(_plain(field.annotation)) is tuple


def _parts(name: str, text: str) -> list[Any]:
    parts = [part for part in text.split(",") if part]
    if _plain(get_args(_plain(Settings.model_fields[name].annotation))[0]) is not int:
        return parts
    try:
        return [int(part) for part in parts]
    except ValueError:
        raise InputError(f"{name} is {text!r}, expected whole numbers as in 300,100") from None
