"""Options, files of settings and lists, all made of what the package declares."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from flatprune.cli import app
from flatprune.criteria import CRITERIA
from flatprune.models import MODELS
from flatprune.settings import Settings
from tests.cli.make_options import BEGIN, END, PAGE, tables


def test_help_has_every_setting_in_80_columns(flatprune, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    outcome = flatprune("run", "--help")
    assert outcome.code == 0 and max(map(len, outcome.out.splitlines())) <= 80
    for name, field in Settings.model_fields.items():
        option = name.replace("_", "-")
        assert f"  --[no-]{option} " in outcome.out or f"  --{option} " in outcome.out, name
        assert f"\n{field.json_schema_extra['panel']}:\n" in outcome.out
    assert "[0.1 with batch" in outcome.out and "[flat_cosine]" in outcome.out


def test_the_documentation_has_the_options():
    text = PAGE.read_text()
    assert text[text.index(BEGIN) : text.index(END)] == f"{BEGIN}\n{tables()}"


def test_printed_settings_are_a_config(flatprune, tmp_path):
    options = (
        "--widths",
        "30,20",
        "--flatness",
        "off",
        "--lr",
        "1e-5",
        "--augment",
        "--exclude",
        "1",
        "--target-macs",
        0.3,
    )
    printed = flatprune("run", *options, "--print-config")
    assert printed.code == 0 and printed.err == ""
    path = tmp_path / "run.yaml"
    path.write_text(printed.out)
    assert flatprune("run", "--config", path, "--print-config").out == printed.out
    assert "flatness: 'off'\n" in printed.out and "target_params: null\n" in printed.out


def test_the_line_wins_over_the_file(flatprune, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("{epochs: 7, augment: on, flatness: off, target_macs: 0.5}")
    assert "epochs: 7\n" in flatprune("run", "--config", path, "--print-config").out
    out = flatprune("run", "--config", path, "--epochs", 3, "--no-augment", "--seed", 5, "--print-config").out
    assert "target_macs: null\n" in flatprune("run", "--config", path, "--target-params", 0.2, "--print-config").out
    for line in ("epochs: 3", "augment: false", "seed: 5", "flatness: 'off'", "target_macs: 0.5"):
        assert f"\n{line}\n" in out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch: 3", ["'epoch'", "did you mean epochs"]),
        ("epochs: 0", ["epochs is 0"]),
        ("epochs: 3\nepochs: 4", ["stands twice"]),
        ("- 1", ["expected a mapping"]),
        ("a: &a [*a]", ["not YAML"]),
    ],
)
def test_a_config_that_cannot_be_used(flatprune, tmp_path, text, words):
    path, out = tmp_path / "run.yaml", tmp_path / "out"
    path.write_text(text)
    outcome = flatprune("run", "--config", path, "--out", out)
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and not out.exists()
    for word in ("run.yaml", *words):
        assert word in outcome.err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("rnu",), ["'rnu'", "'run'"]),
        (("eval", "x", "--devce", "cpu"), ["--devce", "--device"]),
        (("list", "model"), ["'model'", "did you mean models"]),
    ],
)
def test_a_mistyped_name_is_answered(flatprune, command, words):
    outcome = flatprune(*command)
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    for word in words:
        assert word in outcome.err


def test_lists(flatprune, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    for what, names in (("models", MODELS), ("criteria", CRITERIA), ("data", ["digits", "FILE.npz"])):
        outcome = flatprune("list", what)
        listed = dict(line.split(maxsplit=1) for line in outcome.out.splitlines() if re.match(r"\S+ +\S", line))
        assert outcome.code == 0 and set(names) <= set(listed)
        assert all(len(listed[name]) > 20 for name in names)  # each is described
    assert "272,474" in flatprune("list", "models").out


def test_version_and_completion(flatprune):
    assert re.fullmatch(r"flatprune \d+\.\d+\S*\n", flatprune("--version").out)
    assert "--install-completion" in flatprune("--help").out
    found = {name: complete(name, "") for name in ("optimizer", "criterion", "model", "flatness")}
    assert found["optimizer"] == ["sgd", "adam", "adamw"]
    assert found["criterion"] == list(CRITERIA) and found["model"] == list(MODELS)
    assert complete("flatness", "on") == ["on", "on+msam"]


def complete(name, begun):
    """What a shell is offered for the value of an option of `run`."""
    import typer

    command = typer.main.get_command(app).commands["run"]
    option = next(option for option in command.params if option.name == name)
    with command.make_context("run", [], resilient_parsing=True) as context:
        return [item.value for item in option.shell_complete(context, begun)]


def test_help_loads_no_plots():
    code = "import sys, flatprune.cli as cli; cli.main(['run', '--help']); print(*sys.modules, file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0 and "pydantic" in run.stderr.split()
    assert not {"matplotlib", "sklearn", "PIL", "rich.table"} & set(run.stderr.split())
