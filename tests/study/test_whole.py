"""What `flatprune check` says of a study's files."""

from __future__ import annotations

from flatprune.files.atomic import sha256
from flatprune.files.records import write_record
from flatprune.runs.folder import NOT_CHECKED
from flatprune.study.plan import DATA, DATA_FILE
from flatprune.study.report import RESULTS, RESULTS_FILE, STUDY_FILE
from flatprune.study.whole import check_folder

TEXT = b"base: {data: digits, target_params: 0.5}\ngrid: {seed: [1]}\n"


def test_the_data_file_of_another_study_is_noticed(tmp_path):
    (tmp_path / STUDY_FILE).write_bytes(TEXT)
    write_record(tmp_path / RESULTS_FILE, RESULTS, {"groups": [], "files": {STUDY_FILE: sha256(TEXT)}})
    content = {"data_dir": None, "digests": {"digits": "digits"}}
    write_record(tmp_path / DATA_FILE, DATA, {**content, "study": sha256(TEXT)})
    assert set(check_folder(tmp_path).values()) == {"whole"}
    write_record(tmp_path / DATA_FILE, DATA, {**content, "study": sha256(b"another")})
    found = check_folder(tmp_path)
    assert f"{tmp_path / DATA_FILE}: does not fit study.yaml" in found.pop(DATA_FILE)
    assert set(found.values()) == {"whole"}
    (tmp_path / RESULTS_FILE).write_bytes(b"{")
    assert "its SHA-256 is not that in data.json" in check_folder(tmp_path)[STUDY_FILE]


def test_the_results_of_another_study_are_noticed(tmp_path):
    (tmp_path / STUDY_FILE).write_bytes(TEXT)
    write_record(tmp_path / DATA_FILE, DATA, {"data_dir": None, "digests": {"digits": "digits"}, "study": sha256(TEXT)})
    names = ("table.md", "table.csv", "plot.png")
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    others = {name: sha256(b"another") for name in names[:2]}
    write_record(
        tmp_path / RESULTS_FILE, RESULTS, {"groups": [], "files": {**others, names[2]: sha256(names[2].encode())}}
    )
    found = check_folder(tmp_path)
    assert found[RESULTS_FILE].endswith("results.json: is of other files, 2 of its 3 digests are of none here")
    assert found[names[2]] == found[STUDY_FILE] == "whole"
    assert found[names[0]] == found[names[1]] == NOT_CHECKED
    for name in names:
        (tmp_path / name).unlink()  # what is gone says nothing of the list
    found = check_folder(tmp_path)
    assert found[RESULTS_FILE] == "whole" and all("no such file" in found[name] for name in names)
