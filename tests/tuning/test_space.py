"""What the file of a search means, and every way in which it can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from flatprune.errors import InputError
from flatprune.tuning import read_tuning


def read(tmp_path, text):
    path = tmp_path / "search.yaml"
    path.write_text(text)
    return read_tuning(path)


def test_what_is_drawn_are_settings(tmp_path):
    tuning = read(
        tmp_path,
        """
base: {epochs: 3, target_params: 0.3, seed: 4}
space:
  lr: {low: 1e-3, high: 1, log: true}
  batch_size: {low: 32, high: 128, step: 32}
  widths: [[8, 8], [16, 16]]
  augment: [on, off]
  flatness: [on, off]
validation: 0.3
""",
    )
    lr, batch_size, widths, augment, flatness = (place.distribution() for place in tuning.space.values())
    assert (lr.low, lr.high, lr.log) == (1e-3, 1.0, True)
    assert (batch_size.low, batch_size.high, batch_size.step) == (32, 128, 32)
    assert widths.choices == ("8-8", "16-16") and flatness.choices == augment.choices == ("on", "off")
    drawn = {"lr": 0.5, "batch_size": 64, "widths": "16-16", "augment": "off", "flatness": "off"}
    judged, best = tuning.judged(drawn), tuning.settings(drawn)
    assert judged.changed(validation=None) == best and judged.validation == 0.3
    assert (best.lr, best.batch_size, best.widths, best.augment, best.flatness) == (0.5, 64, (16, 16), False, "off")
    assert (best.epochs, best.seed, best.target_params) == (3, 4, 0.3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("space: {l_r: [1, 2]}", ["space", "'l_r'", "did you mean lr"]),
        ("space: {lr: {low: 1, high: 0.1}}", ["lr: low is 1.0 and high 0.1", "expected low below high"]),
        ("space: {lr: {low: 1, high: 1}}", ["expected low below high"]),
        ("space: {lr: {low: 1}}", ["lr has no high"]),
        ("space: {lr: {low: -1, high: 1}}", ["low: lr is -1", "above 0"]),
        ("space: {momentum: {low: 0, high: 1}}", ["high: momentum is 1", "below 1"]),
        ("space: {epochs: {low: 1.5, high: 3}}", ["low: epochs is 1.5", "a whole number"]),
        ("space: {lr: {low: a, high: b}}", ["low: lr is 'a'", "a number"]),
        ("space: {criterion: {low: 0, high: 1}}", ["criterion is 0"]),
        ("space: {augment: {low: true, high: true}}", ["augment is no number"]),
        ("space: {widths: {low: [1], high: [2]}}", ["widths is no number", "a list of values"]),
        ("space: {momentum: {low: 0, high: 0.9, log: true}}", ["momentum: low is 0", "above 0"]),
        ("space: {lr: {low: 0.1, high: 1, log: 1}}", ["log is 1", "true or false"]),
        ("space: {lr: {low: 0.1, high: 1, steps: 2}}", ["'steps'", "did you mean step"]),
        ("space: {lr: {low: 0.1, high: 1, step: 2}}", ["step is 2", "at most 0.9"]),
        ("space: {epochs: {low: 1, high: 9, step: 0.5}}", ["step is 0.5", "a whole number"]),
        ("space: {epochs: {low: 1, high: 9, step: 2, log: true}}", ["log and step"]),
        ("space: {lr: 0.1}", ["lr is 0.1", "a list of values"]),
        ("space: {lr: [0.1, 0.1]}", ["lr has 0.1 twice"]),
        ("space: {lr: [0.1, 0.10000001]}", ["written alike"]),
        ("space: {criterion: [obs, magic]}", ["criterion is 'magic'"]),
        ("space: {target_params: [0.1, 0.2]}", ["target_params is what trials have in common"]),
        ("space: {seed: {low: 1, high: 2}}", ["seed is what trials have in common"]),
        ("space: {}", ["space is empty"]),
        ("space: [lr]", ["space is ['lr']", "a mapping"]),
        ("base: {epochs: 0}\nspace: {lr: [1, 2]}", ["base", "epochs is 0"]),
        ("base: {validation: 0.5}\nspace: {lr: [1, 2]}", ["validation stands beside base"]),
        ("base: {batch_size: 8, accumulate: 3}\nspace: {lr: [1, 2]}", ["base: accumulate is 3"]),
        ("validation: 1\nspace: {lr: [1, 2]}", ["validation is 1", "below 1"]),
        ("spaces: {lr: [1, 2]}", ["'spaces'", "did you mean space"]),
        ("executors: {dusk: {}}\nspace: {lr: [1, 2]}", ["'dusk'", "did you mean dask"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, words):
    with pytest.raises(InputError) as error:
        read(tmp_path, text)
    for word in ("search.yaml", *words):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_the_example_is_valid():
    tuning = read_tuning(Path(__file__).parents[2] / "examples" / "tune.yaml")
    assert set(tuning.space) == {"lr", "flatness_strength", "criterion"}
