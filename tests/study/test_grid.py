"""What a study file means, and every way in which it can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml as pyyaml

from flatprune.errors import InputError
from flatprune.settings import Settings
from flatprune.study import read_study

ROOT = Path(__file__).parents[2]


def cells_of(path):
    return {cell.name: cell.settings for cell in read_study(path).cells}


def test_variants_cross_the_grid_and_override_it(study_file):
    path = study_file(
        """
base: {epochs: 3, lr: 1e-3}
grid: {target_params: [0.2, 0.1], network: {a: {widths: [9]}, b: {model: lenet5}}, seed: [4, 5]}
variants:
  method: {}
  off: {flatness: off, augment: on, only: {target_params: 0.1, network: [a]}}
  dense: {target_params: 1}
"""
    )
    cells = cells_of(path)
    assert len(cells) == 4 * 2 + 2 + 4 * 2
    assert cells["method, target_params 0.2, network b, seed 5"] == Settings(
        epochs=3, lr=1e-3, target_params=0.2, model="lenet5", seed=5
    )
    chosen = cells["off, target_params 0.1, network a, seed 4"]
    assert (chosen.flatness, chosen.augment, chosen.widths) == ("off", True, (9,))
    assert cells["dense, target_params 0.2, network a, seed 4"].target_params == 1.0


def test_the_classic_pipeline_prunes_once_and_restarts(study_file):
    path = study_file("variants: {one shot: {criterion: l1, prune_then_finetune: 0.6}}")
    (settings,) = cells_of(path).values()
    assert (settings.prune_start, settings.prune_end, settings.schedule) == (0.6, 0.6, "restart")


def test_tuning_is_judged_on_held_out_images_with_its_own_seeds(study_file):
    path = study_file(
        "grid: {seed: [7]}\ntune: {validation: 0.3, seed: [1, 2]}\nvariants: {a: {tune: {lr: [0.1, 0.2]}}}"
    )
    (cell,) = read_study(path).cells
    runs = [run for candidate in cell.candidates for run in candidate.runs]
    assert [(run.lr, run.seed, run.validation) for run in runs] == [
        (0.1, 1, 0.3),
        (0.1, 2, 0.3),
        (0.2, 1, 0.3),
        (0.2, 2, 0.3),
    ]
    assert cell.settings.validation is None and cell.seed == 7


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: {epoch: 3}", ["base", "'epoch'", "did you mean epochs"]),
        ("base: {epochs: ten}", ["base", "epochs", "'ten'", "a whole number"]),
        ("grid: {target_params: [0.1, 1.5]}", ["grid: target_params is 1.5", "at most 1"]),
        ("grid: {target_params: [0.1, 0.1]}", ["target_params has 0.1 twice"]),
        ("grid: {target_params: 0.1}", ["target_params is 0.1", "a list"]),
        ("variants: {a: {criterion: magic}}", ["variant 'a'", "criterion", "magic"]),
        ("variants: {a: {scratch_of: b}}", ["variant 'a'", "scratch_of", "'b'"]),
        ("variants: {a: {scratch_of: b}, b: {scratch_of: a}}", ["circle", "a -> b -> a"]),
        ("variants: {a: {prune_then_finetune: 2}}", ["prune_then_finetune is 2"]),
        ("variants: {a: {only: {seeds: [1]}}}", ["variant 'a'", "'seeds' is no axis"]),
        ("variants: {a: {tune: {lr: [0.1]}}, b: {tune: {lr: [0.1, 0.2]}}}", ["unequal effort", "a 1, b 2"]),
        ("reference: b\nvariants: {a: {}}", ["reference is 'b'", "expected one of a"]),
        ("bases: {}", ["'bases'", "did you mean base"]),
        ("base: {epochs: 3, epochs: 4}", ["'epochs' stands twice", "line 1"]),
        ("base: {epochs: [}", ["not YAML", "line 1"]),
        ("- 1", ["expected a mapping"]),
    ],
)
def test_what_is_wrong_is_named(study_file, text, words):
    path = study_file(text)
    with pytest.raises(InputError) as error:
        read_study(path)
    for word in (str(path), *words):
        assert word in str(error.value)


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("bench/studies/*.yaml"), ROOT / "examples" / "study.yaml"]), ids=str
)
def test_the_grids_in_the_repository_are_valid(path):
    study = read_study(path)
    assert len(study.cells) > 5
    assert study.title == pyyaml.safe_load(path.read_text())["title"]
