"""Names that a file system allows and programs stumble over."""

from __future__ import annotations

import io
import json
import os
import warnings

import numpy as np
import pytest

from flatprune.reporting.drawing import plain
from flatprune.runs.folder import WHOLE, check_run
from tests.cli.small_images import image_arrays
from tests.conftest import thorough

OPTIONS = ["--widths", "8,8", "--epochs", "1", "--batch-size", "32", "--target-params", "0.5"]
NAMES = ["a$x_{$b", "<script>&", "-x", "two\nlines", "caf\udce9", "[red]{0}%s", "_", "图 $"]


@pytest.mark.parametrize("name", thorough(NAMES, but=["a$x_{$b", "-x", "caf\udce9"]), ids=ascii)
def test_names_of_data_and_folders(flatprune, tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open(os.fsencode(f"{name}.npz"), "wb") as file:
        np.savez(file, **image_arrays(40, 20))
    data, out = f"{name}.npz", f"out{name}" if not name.startswith("-") else name
    outcome = flatprune("run", f"--data={data}", *OPTIONS, f"--out={out}")
    assert outcome.code == 0, outcome
    assert set(check_run(tmp_path / out).values()) == {WHOLE}
    page = (tmp_path / out / "report.html").read_text()
    assert "<script" not in page
    assert json.loads((tmp_path / out / "summary.json").read_text())["data"] == data
    for command in (["eval", "--", out], ["check", "--", out], ["export", "--to", "torch", "--", out]):
        outcome = flatprune(*command)
        assert (outcome.code, outcome.err) == (0, ""), outcome
    assert flatprune("run", "--resume", f"--out={out}").code == 0


def test_errors_of_such_names_are_one_line(flatprune, tmp_path):
    for name in NAMES:
        outcome = flatprune("run", f"--data={name}.npz", f"--out={tmp_path / 'out'}")
        assert outcome.code == 2 and outcome.err.count("\n") == 1


def test_layers_and_variants_in_the_pages_are_text():
    from flatprune.reporting.page import card, document, value_rows
    from flatprune.reporting.report import _layer_rows

    bad = "<script>x</script>"
    rows = _layer_rows({"widths_before": {bad: 4}, "widths_after": {bad: 2}})
    for text in (rows, card(bad, bad, bad), document(bad, bad, ""), value_rows({bad: bad})):
        assert "<script" not in text and "&lt;script&gt;" in text


def test_text_of_figures_is_no_formula():
    from matplotlib.figure import Figure

    for name in (*NAMES, r"\$\frac{", "$$", "\0", ""):
        plot = Figure()
        axis = plot.subplots()
        axis.plot([0, 1], label=plain(name))
        axis.legend()
        plot.text(0, 0, plain(name))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # letters that the font lacks
            plot.savefig(io.BytesIO(), format="png", dpi=20)
        assert len(axis.get_legend().get_texts()) == 1
