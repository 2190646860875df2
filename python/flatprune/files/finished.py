"""The files that tell what a finished run found, and `digests.json`, which tells what each of them was.

`summary.json` is written last: a run that has it is finished. `digests.json` comes right before it and holds the
SHA-256 of every file that is made at the end, of `summary.json` too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flatprune.errors import DamagedError, InputError
from flatprune.files.atomic import read_bytes, sha256, write_atomically
from flatprune.files.records import Kind, from_json, read_json_lines, read_record, to_json, write_record

SUMMARY_FILE = "summary.json"
HISTORY_FILE = "history.jsonl"
DIGESTS_FILE = "digests.json"
SUMMARY = Kind("flatprune-summary", 1)
HISTORY = Kind("flatprune-history", 1)
DIGESTS = Kind("flatprune-digests", 1)


def read_history(path: Path) -> list[dict[str, Any]]:
    """The records of a `history.jsonl`, without its head; InputError where it cannot be used."""
    return read_json_lines(path, HISTORY)


def write_digests(folder: Path, names: Iterable[str], **contents: bytes) -> None:
    """Write `digests.json` for files that are there, and for others (name -> content) that will be."""
    digests = {name: sha256(read_bytes(folder / name)) for name in names}
    digests |= {name: sha256(content) for name, content in contents.items()}
    write_record(folder / DIGESTS_FILE, DIGESTS, {"files": digests})


def finish(folder: Path, summary: dict[str, Any], names: Iterable[str]) -> None:
    """Write `digests.json` for the files `names` and for `summary.json`, and then that."""
    text = to_json(SUMMARY, summary).encode()
    write_digests(folder, names, **{SUMMARY_FILE: text})
    write_atomically(folder / SUMMARY_FILE, text)


def read_digests(folder: Path) -> dict[str, str]:
    """File name -> SHA-256, of a finished run or of a study's report."""
    files = read_record(folder / DIGESTS_FILE, DIGESTS).get("files")
    if not isinstance(files, dict):
        raise InputError(f"{folder / DIGESTS_FILE}: has no digests of files")
    return files


def check_digest(folder: Path, name: str, content: bytes) -> None:
    """Raise DamagedError where a file of a finished run has not the content that `digests.json` tells of."""
    if read_digests(folder).get(name) != sha256(content):
        raise DamagedError(_other(folder, name, DIGESTS_FILE))


def wrong_files(folder: Path, listing: str, digests: Mapping[str, str]) -> dict[str, str]:
    """What is wrong with the files whose digests the file `listing` tells, a line each: name -> line."""
    wrong = {}
    for name, digest in digests.items():
        try:
            if sha256(read_bytes(folder / name)) != digest:
                wrong[name] = _other(folder, name, listing)
        except InputError as error:
            wrong[name] = str(error)
    return wrong


def _other(folder: Path, name: str, listing: str) -> str:
    return f"{folder / name}: is damaged, or of another run or study (its SHA-256 is not in {listing})"


def read_summary(folder: Path) -> dict[str, Any]:
    """The content of `summary.json`, without format and version.

    Raises:
        InputError: there is none, or it is of another format or version.
        DamagedError: it is not what was written.
    """
    path = folder / SUMMARY_FILE
    content = read_bytes(path)
    if (folder / DIGESTS_FILE).is_file():
        check_digest(folder, SUMMARY_FILE, content)
    summary = from_json(path, content, SUMMARY)
    if not (folder / DIGESTS_FILE).is_file():
        raise DamagedError(f"{path}: cannot be checked, {DIGESTS_FILE} is missing")
    return {key: value for key, value in summary.items() if key not in Kind._fields}


def problems(folder: Path) -> list[str]:
    """What is wrong with the files that `digests.json` of a finished run lists, a line each."""
    return list(wrong_files(folder, DIGESTS_FILE, read_digests(folder)).values())
