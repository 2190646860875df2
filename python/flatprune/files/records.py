"""JSON objects and lines that carry a format and its version, and are checked before they are believed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from flatprune.errors import InputError
from flatprune.files.atomic import damaged, read_bytes, sha256, write_atomically

LIMIT = 1 << 30  # bytes of a JSON file


class Kind(NamedTuple):
    """Of a file: what its `format` and `version` say."""

    format: str
    version: int


def to_json(kind: Kind, content: dict[str, Any]) -> str:
    """`content` after format and version, indented; NaN and infinities become null."""
    return json.dumps(finite({**kind._asdict(), **content}), indent=2) + "\n"


def from_json(path: Path, text: bytes, kind: Kind) -> dict[str, Any]:
    """The object in the text of a file, format and version included.

    Raises:
        InputError: it is of another format, or of another version, which is named.
        DamagedError: it is no JSON object.
    """
    value = parse(path, text)
    if not isinstance(value, dict):
        raise damaged(path, f"it holds a {type(value).__name__}, not an object")
    _check_kind(path, value, kind)
    return value


def write_record(path: Path, kind: Kind, content: dict[str, Any]) -> None:
    """Write an object with the digest of its own content, through `write_atomically`."""
    plain = json.loads(to_json(kind, content))
    write_atomically(path, json.dumps({**plain, "digest": _digest(plain)}, indent=2) + "\n")


def read_record(path: Path, kind: Kind) -> dict[str, Any]:
    """What `write_record` wrote, without format, version and digest.

    Raises:
        InputError: there is no such file, or it is of another format or version.
        DamagedError: it is not what was written.
    """
    value = from_json(path, read_bytes(path, LIMIT), kind)
    if value.pop("digest", None) != _digest(value):
        raise damaged(path, "its content does not have the digest in it")
    return {key: item for key, item in value.items() if key not in Kind._fields}


def write_json_lines(path: str | os.PathLike[str], records: list[dict[str, Any]], kind: Kind) -> None:
    """Write one object a line through `write_atomically`, after a first one (`kind` "head") with format and version."""
    head = {"kind": "head", **kind._asdict(), "records": len(records)}
    write_atomically(path, "".join(json.dumps(finite(record)) + "\n" for record in (head, *records)))


def read_json_lines(path: Path, kind: Kind) -> list[dict[str, Any]]:
    """The objects that `write_json_lines` wrote, without the first.

    Raises:
        InputError: there is no such file, or it is of another format or version.
        DamagedError: a line is no JSON object, or their number is not that in the first.
    """
    lines = [parse(path, line) for line in read_bytes(path, LIMIT).splitlines()]
    if not lines or not all(isinstance(line, dict) for line in lines):
        raise damaged(path, "a line is no object" if lines else "it is empty")
    _check_kind(path, lines[0], kind)
    if lines[0].get("records") != len(lines) - 1:
        raise damaged(path, f"it has {len(lines) - 1} records, not {lines[0].get('records')!r:.80}")
    return lines[1:]


def parse(path: str | os.PathLike[str], text: bytes) -> Any:
    """The value in JSON; DamagedError, in one line that names the file, where there is none."""
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, numbers of thousands of digits
        raise damaged(path, error) from error


def finite(value: Any) -> Any:
    """The same nested value with None for numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and value - value != 0.0:
        return None
    return value


def _check_kind(path: Path, value: dict[str, Any], kind: Kind) -> None:
    if value.get("format") != kind.format:
        raise InputError(f"{path}: format is {value.get('format')!r:.80}, expected {kind.format!r}")
    if value.get("version") != kind.version:
        raise InputError(
            f"{path}: {kind.format} version {value.get('version')!r:.80}, this package reads {kind.version}"
        )


def _digest(value: dict[str, Any]) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode())
