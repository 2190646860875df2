"""What counts as a regression."""

import json

import pytest

from bench.compare import IMPROVEMENT, REGRESSION, SAME, compare, main
from tests.bench.documents import case, document, growth, memory


def verdicts(old, new):
    return [change.verdict for change in compare(document(old), document(new))]


@pytest.mark.parametrize(
    ("native", "half_width", "expected"),
    [
        (1.0, 0.01, SAME),
        (1.04, 0.001, SAME),  # within the margin
        (1.2, 0.01, REGRESSION),
        (0.8, 0.01, IMPROVEMENT),
        (1.2, 0.2, SAME),  # within the noise
        (2.0, 0.2, REGRESSION),
    ],
)
def test_time_beside_a_baseline(native, half_width, expected):
    old = case("inverse", "net", 1.0, half_width, cholesky=3.0)
    assert verdicts(old, case("inverse", "net", native, half_width, cholesky=3.0)) == [expected]


def test_load_that_slows_both_alike_is_no_regression():
    old = case("inverse", "net", 1.0, cholesky=3.0)
    assert verdicts(old, case("inverse", "net", 2.0, cholesky=6.0)) == [SAME]


def test_without_a_baseline_the_time_counts():
    assert verdicts(case("inverse", "net", 1.0), case("inverse", "net", 1.5)) == [REGRESSION]


@pytest.mark.parametrize(("bytes_now", "expected"), [(11 << 20, SAME), (16 << 20, REGRESSION), (4 << 20, IMPROVEMENT)])
def test_memory(bytes_now, expected):
    assert verdicts(memory("A", 10 << 20, 1 << 30), memory("A", bytes_now, 1 << 30)) == [expected]


def test_growth_and_new_cases_are_left_out():
    assert verdicts(growth("A", 1.0), growth("A", 3.0)) == []
    assert verdicts(case("inverse", "one", 1.0), case("inverse", "other", 9.0)) == []


def test_a_noisy_run_is_called_so(tmp_path, capsys):
    noisy = document(case("inverse", "net", 1.0, 0.3, cholesky=3.0))
    assert run(tmp_path, noisy, noisy) == 0
    assert capsys.readouterr().out.count("WIDE") == 2


def run(tmp_path, old, new):
    paths = []
    for name, content in (("old.json", old), ("new.json", new)):
        paths.append(tmp_path / name)
        paths[-1].write_text(json.dumps(content))
    return main([str(path) for path in paths])


def test_exit_status(tmp_path, capsys):
    fast, slow = (document(case("inverse", "net", seconds, cholesky=3.0)) for seconds in (1.0, 1.5))
    assert run(tmp_path, fast, fast) == 0
    assert run(tmp_path, slow, fast) == 0
    assert "improvement" in capsys.readouterr().out
    assert run(tmp_path, fast, slow) == 1
    assert "REGRESSION  x1.50  inverse / net" in capsys.readouterr().out


def test_other_machines_are_named(tmp_path, capsys):
    here = document(case("inverse", "net", 1.0, cholesky=3.0))
    there = json.loads(json.dumps(here))
    there["machine"]["threads"] = 1
    assert run(tmp_path, here, there) == 0
    assert "differs: threads: 2 / 1" in capsys.readouterr().out


def test_files_that_cannot_be_compared(tmp_path, capsys):
    here = document(case("inverse", "net", 1.0))
    assert run(tmp_path, here, {"format": 99}) == 2
    assert "not a result" in capsys.readouterr().err
    assert run(tmp_path, here, document()) == 2
