"""What the plots of a study show, by the first axis of its grid."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from flatprune.study.plots import figure
from flatprune.study.report import _plot_names
from flatprune.study.results import BY_KEY, Group, Results


def results_of(axis, values=("0.2", "0.1"), **figures):
    """Two variants at two values of an axis, whose accuracy is 90 and 80."""
    summary = {
        "train_accuracy_last": 99.0,
        "params_before": 100,
        "params_after": 50,
        "macs_before": 9,
        "macs_after": 3,
    }
    groups = [
        Group(variant, ((axis, value),), {1: {**summary, "test_accuracy_last": accuracy, **figures}})
        for variant in ("a", "b")
        for value, accuracy in zip(values, (90.0, 80.0))
    ]
    results = SimpleNamespace(study=SimpleNamespace(axes={axis: values}), groups=groups)
    results.present = lambda keys: Results.present(results, keys)
    return results


def titles(results):
    return [axis.get_title(loc="left") for axis in figure(results, results.groups, "plot").axes if axis.get_visible()]


@pytest.mark.parametrize("axis", ["target_params", "target_macs"])
def test_sizes_run_along_what_was_measured(axis):
    shown = titles(results_of(axis))
    assert "test accuracy, % against parameters" in shown and "gap, points against parameters" in shown


def test_other_axes_run_along_their_values_in_order():
    results = results_of("label_noise", test_nll=0.5)
    assert titles(results) == ["test accuracy, % by label noise", "gap, points by label noise", "NLL by label noise"]
    axis = figure(results, results.groups, "plot").axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0.2", "0.1"]
    for container in axis.containers:
        assert list(container.lines[0].get_ydata()) == [90.0, 80.0]


def test_values_that_are_no_numbers_are_not_joined():
    results = results_of("task", ("a perceptron on clean labels", "a conv net"))
    axis = figure(results, results.groups, "plot").axes[0]
    assert axis.get_xticklabels()[0].get_text() == "a perceptron on clean\nlabels"
    assert {container.lines[0].get_linestyle() for container in axis.containers} == {"None"}


def test_ticks_of_a_logarithmic_axis_do_not_meet():
    results = results_of("target_params")
    results.groups[0].summaries[1]["params_after"] = 1500
    results.groups[1].summaries[1]["params_after"] = 80_000
    axis = figure(results, results.groups, "plot").axes[0]
    assert axis.get_xscale() == "log" and not axis.get_xticks(minor=True).size
    assert "50k" in [label.get_text() for label in axis.get_xticklabels()]


def test_each_section_has_a_file_of_its_own():
    names = ["", "a b", "A-B", "图", "画", "x" * 300, "x" * 301]
    files = _plot_names(names)
    assert files[:5] == ["plot.png", "plot-a-b.png", "plot-a-b-1.png", "plot-1.png", "plot-2.png"]
    assert len(set(files)) == len(names) and max(map(len, files)) < 120


def test_correlations_stand_alone():
    key = "spearman_radius_expand"
    assert titles(results_of("network", **{key: 0.9})) == [BY_KEY[key].title]
