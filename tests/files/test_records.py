"""JSON of the package: read back only if it is what was written."""

from __future__ import annotations

import json

import pytest

from flatprune.errors import DamagedError, InputError
from flatprune.files.finished import HISTORY, SUMMARY_FILE, finish, read_history, read_summary
from flatprune.files.records import Kind, finite, read_record, write_json_lines, write_record

KIND = Kind("test", 2)
CONTENT = {"rate": 0.1, "name": "\udcff\n", "none": float("nan"), "list": [1, [2.5, None]]}


@pytest.fixture
def record(tmp_path):
    path = tmp_path / "record.json"
    write_record(path, KIND, CONTENT)
    return path


def test_record_comes_back(record):
    assert read_record(record, KIND) == {**CONTENT, "none": None}
    found = json.loads(record.read_text())
    assert (found["format"], found["version"]) == ("test", 2)


def test_json_has_no_nan():
    assert finite({"x": float("nan"), "y": [1.5, float("inf")]}) == {"x": None, "y": [1.5, None]}


def test_every_changed_value_is_found(record):
    text = record.read_bytes()
    accepted = []
    for place in range(len(text)):
        record.write_bytes(text[:place] + bytes([text[place] ^ 1]) + text[place + 1 :])
        try:
            accepted.append(read_record(record, KIND))
        except InputError as error:
            assert str(error).startswith(f"{record}: ") and "\n" not in str(error)
    assert all(value == {**CONTENT, "none": None} for value in accepted)  # white space alone


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"null", b'{"format": "test"'],
    ids=["empty", "half", "list", "bytes", "deep", "digits", "null", "cut"],
)
def test_what_is_no_record(record, text):
    record.write_bytes(text)
    with pytest.raises(DamagedError, match=r"record.json: is damaged") as error:
        read_record(record, KIND)
    assert len(str(error.value)) < 400


def test_other_kinds_are_refused_by_name_and_number(record):
    with pytest.raises(InputError, match="test version 2, this package reads 3"):
        read_record(record, Kind("test", 3))
    with pytest.raises(InputError, match="format is 'test', expected 'other'"):
        read_record(record, Kind("other", 2))


def test_history_that_is_cut_off_is_damaged(tmp_path):
    records = [{"kind": "epoch", "epoch": number} for number in (1, 2, 3)]
    path = tmp_path / "history.jsonl"
    write_json_lines(path, records, HISTORY)
    assert read_history(path) == records
    lines = path.read_bytes().splitlines(keepends=True)
    for part in (lines[:-1], [lines[0]], [], [*lines, lines[-1]], [*lines[:-1], b"{\n"], [*lines[:-1], b"3\n"]):
        path.write_bytes(b"".join(part))
        with pytest.raises(DamagedError, match=r"history.jsonl: is damaged"):
            read_history(path)
    path.write_bytes(b"".join(lines[1:]))  # as before there was a head
    with pytest.raises(InputError, match=r"history.jsonl: format is None"):
        read_history(path)


def test_summary_is_what_the_digests_tell_of(tmp_path):
    (tmp_path / "other").write_text("x")
    finish(tmp_path, {"data": "digits", "accuracy": 93.5}, ["other"])
    assert read_summary(tmp_path) == {"data": "digits", "accuracy": 93.5}
    path = tmp_path / SUMMARY_FILE
    path.write_text(path.read_text().replace("93.5", "93.6"))
    with pytest.raises(DamagedError, match=r"summary.json: is damaged"):
        read_summary(tmp_path)
    path.write_text('{"data": "digits"}')
    (tmp_path / "digests.json").unlink()
    with pytest.raises(InputError, match=r"summary.json: format is None, expected 'flatprune-summary'"):
        read_summary(tmp_path)
