"""The page and the chart say what the JSON says."""

import json

import pytest

from bench.goals import MISSED, REACHED, UNKNOWN, verdicts
from bench.machine import ROOT
from bench.report import markdown, newest, plot, write
from bench.results import load
from bench.table import noise_line, print_summary
from tests.bench.documents import case, document, growth, memory


def state(goal, *cases):
    found = [v for v in verdicts(document(*cases)) if v.goal.startswith(goal)]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(("unfold", "expected"), [(5.1, REACHED), (4.9, MISSED)])
def test_a_goal_is_decided_by_its_worst_case(unfold, expected):
    cases = [case("covariance", "A, VGG-small b64", 1.0, unfold=9.0), case("covariance", "A, ResNet20 b32", 1.0)]
    cases[1] = case("covariance", "A, ResNet20 b32", 1.0, unfold=unfold)
    verdict = state("covariance of all layers", *cases)
    assert verdict.state == expected
    assert f"{unfold:.2f} (ResNet20 b32)" in verdict.measured


def test_the_better_plain_way_counts():
    verdict = state(
        "covariance of a 3x3 layer of 16", case("covariance of one layer", "3x3 16", 1.0, unfold=9.0, strided=2.0)
    )
    assert verdict.state == MISSED


def test_steps_are_held_to_the_bare_step():
    step = case("training step", "defaults, ViT-tiny b16", 1.1, bare=1.0)
    assert state("step with the defaults", step).state == REACHED
    step = case("training step", "defaults, VGG-small b64", 1.3, bare=1.0)
    assert state("step with the defaults", step).state == MISSED


def test_memory_is_held_to_the_better_plain_way():
    goal = "peak extra memory of the covariances"
    assert state(goal, memory("covariance, net", 90, 10, unfold=200, strided=100)).state == REACHED
    assert state(goal, memory("covariance, net", 110, 10, unfold=200, strided=100)).state == MISSED


def test_each_first_event_has_a_goal_of_its_own():
    event = case("removal", "first event to half of ResNet-18", 2.4, **{"bare step": 1.0})
    verdict = state("first removal event to half of ResNet-18", event)
    assert verdict.state == REACHED and "2.40 (ResNet-18)" in verdict.measured
    assert state("first removal event to half of ResNet-56", event).state == UNKNOWN


def test_what_was_not_measured_is_not_reached():
    assert {v.state for v in verdicts(document())} == {UNKNOWN}


FULL = document(
    case("covariance", "A, VGG-small b64", 1e-3, unfold=7e-3),
    case("training step", "defaults, VGG-small b64", 0.12, bare=0.1),
    memory("covariance, VGG-small b64", 1 << 20, 8 << 20, unfold=4 << 20),
    growth("A, 64 channels", 1.02),
)


def test_page():
    page = markdown(FULL, "bench/results/some.json")
    assert "| A, VGG-small b64 | native | 1 ms | 2% | 1 ms |  |" in page
    assert "|  | unfold | 7 ms | 2% | 7 ms | 7.00 |" in page
    assert "| 7.00 (VGG-small b64); 1 of 1 | reached |" in page
    assert "*largest activation* | 8.0 MiB" in page
    assert "native 1.02" in page
    assert "Some CPU, 2 cores, 2 threads" in page and "commit 0123456789" in page
    assert "asdl not installed, singd 0.0.5" in page and "*fails: RuntimeError: no*" in page


def test_an_interrupted_run_is_called_so():
    assert "interrupted" in markdown(FULL | {"finished": None}, "x.json")
    assert "interrupted" not in markdown(FULL, "x.json")


def test_chart(tmp_path):
    plot(FULL, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    plot(document(), tmp_path / "empty.png")
    assert not (tmp_path / "empty.png").exists()


def test_table(capsys):
    print_summary(FULL)
    shown = capsys.readouterr().out
    assert "A, VGG-small b64" in shown and "Skipped, not installed: asdl" in shown


def test_wide_spread_is_said():
    assert "WIDE" not in noise_line(FULL)
    noisy = document(case("covariance", "A, net", 1.0, half_width=0.2, unfold=7.0))
    assert "WIDE" in noise_line(noisy)


def test_the_newest_whole_run_makes_the_page(tmp_path):
    def write(name, **changes):
        (tmp_path / f"{name}.json").write_text(json.dumps(FULL | changes))

    assert newest(tmp_path) is None
    write("interrupted", started="2026-01-04 00:00:00", finished=None)
    write("quick", started="2026-01-05 00:00:00", quick=True)
    assert newest(tmp_path).stem == "interrupted"
    write("newer", started="2026-01-02 00:00:00")
    write("older")
    write("nvidia-h100", started="2026-01-06 00:00:00", machine=FULL["machine"] | {"device": "NVIDIA H100"})
    write("nvidia-h100-check", started="2026-01-07 00:00:00", machine={"device": "NVIDIA H100"}, cases=[])
    (tmp_path / "crossover.json").write_text("{}")
    assert newest(tmp_path).stem == "newer" and newest(tmp_path, gpu=True).stem == "nvidia-h100"


def between(page):
    return page.read_text().split("<!-- gpu-results -->")[1]


def test_the_committed_results_make_the_pages(tmp_path):
    """Those of a GPU stand in its page as its JSON has them."""
    assert newest().name.endswith("t.json") and verdicts(load(newest()))
    page = tmp_path / "kernels.md"
    page.write_text("before\n<!-- gpu-results -->\n<!-- gpu-results -->\nafter\n")
    write(newest(gpu=True), tmp_path)
    assert between(page) == between(ROOT / "docs" / "kernels.md")
