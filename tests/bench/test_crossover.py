"""The rule that chooses an algorithm for the covariance is what a committed measurement says."""

import json
import statistics

import pytest

from bench import crossover
from bench.results import RESULTS

FILES = sorted(RESULTS.glob("crossover-*.json"))
MEASURED = {path.stem: json.loads(path.read_text()) for path in FILES}


def test_there_is_a_measurement_of_each_rule():
    assert {document["machine"]["simd"] for document in MEASURED.values()} == set(crossover.BUILT_IN)


@pytest.mark.parametrize("name", MEASURED)
def test_the_built_in_weights_are_its_fit(name):
    assert crossover.built_in(MEASURED[name]["machine"]["simd"]) == crossover.fit(MEASURED[name]["rows"])


@pytest.mark.parametrize("name", MEASURED)
def test_the_rule_is_worth_having(name):
    rows, weights = MEASURED[name]["rows"], crossover.built_in(MEASURED[name]["machine"]["simd"])
    lost = statistics.fmean(value for _, _, value in crossover.judge(rows, weights))
    assert lost < 0.05 < min(crossover.always(rows, key) for key in ("shift_ms", "patches_ms"))


def test_fit_finds_the_weights_that_made_the_times():
    weights = crossover.Weights([1.0, 0.5, 300.0, 7.0], [2.0, 3.0, 900.0])
    rows = []
    for channels in (1, 3, 8, 24, 48):
        for size in (3, 6, 13):
            image = [4, channels, size, size]
            work = crossover._C.covariance_work(crossover.shape_of(image, 3, 1))
            times = [1e-6 * sum(a * b for a, b in zip(*pair)) for pair in zip(work, weights)]
            rows.append({"image": image, "kernel": 3, "stride": 1, "shift_ms": times[0], "patches_ms": times[1]})
    assert crossover.fit(rows) == weights


def test_a_rule_that_is_not_the_fit_is_refused(tmp_path, monkeypatch, capsys):
    path = tmp_path / "crossover.json"
    document = json.loads(FILES[0].read_text())
    crossover.write(path, document)
    monkeypatch.setattr("sys.argv", ["crossover", "--fit", str(path)])
    assert crossover.main() == 0
    other = dict.fromkeys(crossover.BUILT_IN, crossover.Weights([1.0, 0, 0, 0], [1.0, 0, 0]))
    monkeypatch.setattr(crossover, "BUILT_IN", other)
    assert crossover.main() == 1
    assert "rule right in" in capsys.readouterr().out
