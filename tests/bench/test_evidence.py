"""Tables and plots of studies in the page of results."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from bench.evidence import PAGE, STUDIES, correlations, main, widths_by_kind
from flatprune.study import read_study, run_study
from flatprune.study.plan import RUNS_FOLDER
from flatprune.study.results import Group

STUDY = """
base: {data: digits, model: mlp, epochs: 1, widths: [8, 8], flatness: off}
grid: {target_params: [0.5, 0.6], seed: [1]}
variants:
  run: {only: {target_params: [0.5]}}
  left out: {criterion: l1, only: {target_params: [0.6]}}
"""
GRIDS = Path(__file__).parents[2] / "bench" / "studies"


def test_every_study_has_a_grid_and_a_place_on_the_page():
    for name in STUDIES:
        assert (GRIDS / f"{name}.yaml").is_file()
        assert PAGE.read_text().count(f"<!-- {name} -->") == 2


def test_correlations_are_over_all_runs_of_a_point():
    def group(variant, *figures):
        names = "train_accuracy_last", "test_accuracy_last", "hessian_lambda_max", "spectral_radius_kfac"
        return Group(variant, (("task", "x"),), {seed: dict(zip(names, row)) for seed, row in enumerate(figures)})

    groups = [group("none", (100, 90, 5.0, 0.1), (100, 80, 7.0, 0.05)), group("penalty", (99, 95, 1.0, 0.4))]
    table = correlations(SimpleNamespace(groups=groups))
    assert table.rows == (("task x", "1.00 (3)", "-1.00 (3)"),)


def test_widths_are_summed_by_kind():
    def group(variant, *widths):
        names = "blocks.0.attn.qkv", "blocks.1.attn.qkv", "patches", "blocks.0.mlp.0"
        summaries = {seed: {"widths_after": dict(zip(names, each))} for seed, each in enumerate(widths)}
        return Group(variant, (("task", "x"),), summaries)

    dense, pruned = group("dense", (48, 48, 8, 20)), group("pruned", (48, 0, 4, 5), (48, 24, 4, 15))
    groups = [pruned, group("narrowed"), dense]
    results = SimpleNamespace(
        groups=groups, study=SimpleNamespace(axes={"task": ("x",)}), group=lambda name, **point: dense
    )
    table = widths_by_kind(results, "dense")
    assert table.head[:3] == ("variant", "task", "n") and table.left == 2
    assert table.head[3:] == ("heads", "perceptrons", "residual stream")
    assert table.rows == (("pruned", "x", "2", "62 ± 18", "50 ± 35", "50 ± 0"),)


@pytest.mark.thorough
def test_only_what_was_run_is_shown(tmp_path):
    name = "q1_size_digits"
    path, page = tmp_path / "study.yaml", tmp_path / "page.md"
    path.write_text(STUDY)
    page.write_text(f"before\n<!-- {name} -->\nold\n<!-- {name} -->\nafter\n")
    plan, failed = run_study(read_study(path), tmp_path / name, jobs=1, console=Console(quiet=True))
    assert not failed
    left_out = next(cell for cell in plan.study.cells if cell.variant == "left out")
    summary = tmp_path / name / RUNS_FOLDER / plan.key(left_out.settings) / "summary.json"
    for file in ("summary.json", "digests.json"):
        summary.with_name(file).unlink()
    assert main([str(tmp_path), "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert "|  | target_params 0.5 |" in text and "| run |" in text and "left out" not in text
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
