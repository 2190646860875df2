"""Study files from anywhere: one line, at once, whatever they hold."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flatprune.errors import InputError
from flatprune.settings import Settings
from flatprune.study import Study, read_study

BOMB = "\n".join(
    ["  - &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    + [f"  - &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
)
GRID = "".join(f"  {name}: {[0.01 + i / 10**4 for i in range(900)]}\n" for name in ("lr", "momentum", "label_noise"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"title:\n{BOMB}", "more than 20,000 entries"),
        (f"grid:\n  seed:\n{BOMB}", "more than 20,000 entries"),
        ("base: " + "[" * 5000 + "]" * 5000, "more than 100 levels"),
        ("base: " + "{a: " * 3000 + "1" + "}" * 3000, "more than 100 levels"),
        ("base: &a {x: *a}", "the alias 'a' stands for nothing"),
        ("description: &a [1, *a]", "the alias 'a' stands for nothing"),
        ("base: {epochs: " + "9" * 5000 + "}", "more than 100 digits"),
        ("base: {lr: 1e999}", "lr is inf"),
        ("base: {epochs: 2020-99-99}", "line 1: '2020-99-99' is no value"),
        ("base: {epochs: !!int x}", "line 1"),
        ("base: {data: !!binary aGVsbG8=}", "data is b'hello'"),
        ("base: !!set {a, b}", "base is {"),
        ("base: {? [a, b] : 1}", "a key is no word"),
        ("title: [a]", "title is ['a'], expected a text"),
        ("grid: {seed: {a: {lr: 1}}}", "seed has an entry without a seed"),
        ("tune: {seed: []}\nvariants: {a: {tune: {lr: [1, 2]}}}", "seed is []"),
        ("variants: {a: {scratch_of: [a]}}", "scratch_of is ['a']"),
        ("variants: {a: {only: {lr: 1}}}", "'lr' is no axis"),
        (f"grid:\n{GRID}", "more than 10,000 runs"),
        ("grid: {seed: " + str(list(range(10_001))) + "}", "more than 10,000 runs"),
        ("grid: {seed: " + str(list(range(20_001))) + "}", "more than 20,000 entries"),
        ("base: {data: " + "x" * 1_000_000 + "}", "larger than 1,000,000 bytes"),
        ("base: {}\n---\nbase: {}", "line 2"),
        ("\x01", "special characters are not allowed"),
        ("", "expected a mapping"),
    ],
    ids=lambda value: ascii(value[:20]) if isinstance(value, str) else None,
)
def test_refused_in_one_line(study_file, text, words):
    start = time.process_time()
    with pytest.raises(InputError) as error:
        read_study(study_file(text))
    assert words in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 2000
    assert time.process_time() - start < 20  # none of them is written out


def test_aliases_and_bytes_marks_are_allowed(study_file):
    study = read_study(study_file("\ufeffbase: &b {epochs: 3}\nvariants: {a: {}, b: {<<: *b, lr: 0.5}}"))
    assert [cell.settings.epochs for cell in study.cells] == [3, 3]


@pytest.mark.parametrize(
    ("data", "word"),
    [(name, "no such file") for name in ("", "a\\0b", "/dev/zero", "-")] + [("/", "holds no image")],
)
def test_data_that_is_no_file(study_file, study, tmp_path, data, word):
    outcome = study(study_file(f'base: {{data: "{data}"}}'), "--out", tmp_path / "out")
    assert outcome.returncode == 2 and outcome.stderr.count("\n") == 1 and word in outcome.stderr


def test_a_study_from_a_pipe_is_read_once(study_file):
    source, sink = os.pipe()
    os.write(sink, study_file().read_bytes())
    os.close(sink)
    study = read_study(Path(f"/dev/fd/{source}"))
    os.close(source)
    assert study.text == study_file().read_bytes() and len(study.cells) == 2


NAMES = st.sampled_from([*Settings.model_fields, "only", "tune", "scratch_of", "prune_then_finetune", "a"])
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.dates(), st.binary(max_size=3),
    st.sampled_from(["on", "a", "mlp", "digits", "obs"]),
)  # fmt: skip
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=6
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.dictionaries(
        st.sampled_from(["title", "description", "base", "grid", "variants", "tune", "reference"]),
        VALUES | st.dictionaries(NAMES, VALUES, max_size=3),
    )
)
def test_any_content_is_a_study_or_one_line(tmp_path, content):
    path = tmp_path / "any.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    try:
        assert isinstance(read_study(path), Study)
    except InputError as error:
        assert str(path) in str(error)


@pytest.mark.thorough
def test_a_damaged_run_is_made_anew_when_asked(study_file, study, tmp_path, flatprune):
    """Checkpoint, summary and history of runs, each damaged, then the study; its folder has a name of two lines."""
    text = "base: {data: digits, epochs: 1, target_params: 0.5, widths: [8, 8], train_size: 200}\ngrid: {seed: [1, 2]}"
    path, out = study_file(text), tmp_path / "two\nlines"
    assert study(path, "--out", out, "--jobs", 1).returncode == 0
    first, second = sorted((out / "runs").iterdir())
    (first / "summary.json").unlink()
    (first / "checkpoint.pt").write_bytes(b"PK half a file")
    (second / "history.jsonl").write_text("{")
    outcome = study(path, "--out", out, "--jobs", 1)
    assert outcome.returncode == 2 and "--restart-damaged" in outcome.stderr and "2 runs failed" in outcome.stderr
    assert outcome.stderr.count("\n") == 1 and "checkpoint.pt: is damaged" in outcome.stdout
    assert (first / "checkpoint.pt").read_bytes() == b"PK half a file"
    outcome = study(path, "--out", out, "--jobs", 1, "--restart-damaged")
    assert outcome.returncode == 0, outcome
    assert (first / "checkpoint.pt.damaged").read_bytes() == b"PK half a file"
    assert json.loads((out / "results.json").read_text())["format"] == "flatprune-results"
    assert flatprune("check", out).code == 0
    (out / "study.yaml").write_text((out / "study.yaml").read_text().replace("0.5", "0.6"))
    outcome = study("--report-only", out)
    assert outcome.returncode == 2 and "study.yaml: is damaged" in outcome.stderr
    outcome = flatprune("check", out)
    assert outcome.code == 2 and "study.yaml" in outcome.err
