"""YAML as a study, or a file of settings, means it.

`on` and `off` are words, 1e-3 is a number, and a key that stands twice is an error.

A file may have 1 MB, 100 levels, 20,000 entries (each counted as often as aliases repeat it) and numbers of 100 digits.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from flatprune.errors import InputError
from flatprune.files.atomic import read_bytes

MAX_BYTES = 1_000_000
MAX_DEPTH = 100
MAX_ENTRIES = 20_000
MAX_DIGITS = 100
_BOOL, _FLOAT, _INT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:int"


class _Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` with the booleans and numbers of YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is no word", key.start_mark)
            if (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r:.80} stands twice", node.start_mark
                )
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if isinstance(node, yaml.ScalarNode) and node.tag in (_INT, _FLOAT) and len(node.value) > MAX_DIGITS:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of more than {MAX_DIGITS} digits", node.start_mark
            )
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError, TypeError, AttributeError) as error:  # a date of month 99, 0x alone
            problem = f"{node.value!r:.80} is no value ({error})"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|false)$", re.IGNORECASE), list("tTfF"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"^[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?$|^[-+]?\.(?:inf|Inf)$|^\.(?:nan|NaN)$"),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> tuple[dict[str, Any], bytes]:
    """The mapping in a YAML file, and the bytes that it was read from.

    Raises:
        InputError: there is no such file, it is not YAML, beyond a limit, or not a mapping; with the line.
    """
    try:
        data = _read(path)
        text = data.decode("utf-8-sig")
        _check_size(text)
        content = yaml.load(text, _Loader)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" in line {mark.line + 1}"
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise InputError(f"{path}: not YAML{where}: {problem}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: is {type(content).__name__}, expected a mapping")
    return content, data


def _read(path: Path) -> bytes:
    if path.exists() and not path.is_dir() and not path.is_file():  # a pipe, as of <(command)
        with open(path, "rb") as file:
            return file.read(MAX_BYTES)
    return read_bytes(path, MAX_BYTES)


def _check_size(text: str) -> None:
    """Raise YAMLError where the file is too deep or, with every alias written out, too large.

    The events of the parser come before anything is made of them.
    """
    sizes: dict[str, int] = {}  # of what an anchor names
    opened: list[tuple[str | None, int]] = []  # anchor, and entries before it
    entries = 0
    for event in yaml.parse(text, _Loader):
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.AliasEvent):
            if anchor not in sizes:
                raise yaml.composer.ComposerError(
                    None,
                    None,
                    f"the alias {anchor!r:.80} stands for nothing, or for what it is part of",
                    event.start_mark,
                )
            entries += sizes[anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            entries += 1
            opened.append((anchor, entries - 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor is not None:
                sizes[anchor] = entries - before
        elif isinstance(event, yaml.ScalarEvent):
            entries += 1
            if anchor is not None:
                sizes[anchor] = 1
        if len(opened) > MAX_DEPTH or entries > MAX_ENTRIES:
            limit = f"{MAX_DEPTH} levels" if len(opened) > MAX_DEPTH else f"{MAX_ENTRIES:,} entries"
            raise yaml.composer.ComposerError(None, None, f"more than {limit}", event.start_mark)
