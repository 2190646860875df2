"""Alternation, work sets, baselines and the result file."""

import itertools
import json
import math

import pytest
import torch

import kfac_ext
from bench import baselines, peers, worksets
from bench.check import agreeing, worst_error
from bench.documents import table, write_json
from bench.results import Results, load
from bench.timing import Alternation, quartiles, slope, spread, summary, wall_and_cpu


def fake_clock(step=1.0):
    ticks = itertools.count()
    return lambda: step * next(ticks)


def test_variants_alternate_and_each_goes_first():
    order = []
    variants = {name: lambda name=name: order.append(name) for name in "abc"}
    alternation = Alternation(variants, stopwatch=wall_and_cpu(fake_clock(), fake_clock()))
    for _ in range(3):
        alternation.round()
    assert "".join(order) == "abcbcacab"
    assert all(samples.wall == [1.0] * 3 for samples in alternation.samples.values())


def test_calibration_fits_the_budget():
    alternation = Alternation({"a": int, "b": int}, stopwatch=wall_and_cpu(fake_clock(0.1), fake_clock()))
    assert alternation.calibrate(budget=2.0, min_rounds=3) == 10
    assert alternation.calibrate(budget=0.1, min_rounds=3) == 3
    assert alternation.samples["a"].wall == []


def test_after_its_time_it_makes_the_fewest_rounds():
    for seconds, rounds in ((math.inf, 5), (0.0, 3)):
        calls = []
        alternation = Alternation({"a": lambda calls=calls: calls.append(1)}, stopwatch=no_cpu)
        alternation.rounds(5, seconds)
        assert len(alternation.samples["a"].wall) == rounds and len(calls) == rounds + 2
        assert "cpu_median" not in summary(alternation.samples["a"], None)


def no_cpu(run, repeats):
    run()
    return 1.0, None


def test_what_comes_before_is_not_timed():
    done = []
    alternation = Alternation({"a": lambda: done.append("run")}, before={"a": lambda: done.append("before")})
    alternation.calibrate(0.0, 1)
    done.clear()
    alternation.round()
    assert done == ["before", "run"] and alternation.samples["a"].repeats == 1


def test_summary():
    alternation = Alternation({"native": int, "plain": int})
    alternation.samples["native"].wall, alternation.samples["native"].cpu = [1.0, 2.0, 3.0], [1.0] * 3
    alternation.samples["plain"].wall, alternation.samples["plain"].cpu = [2.0, 4.0, 12.0], [2.0] * 3
    native = alternation.samples["native"]
    found = summary(alternation.samples["plain"], native, 0.5)
    assert (found["median"], found["min"], found["cpu_median"]) == (2.0, 1.0, 1.0)
    assert (found["speedup"], found["paired_speedup"], found["paired_q3"]) == (2.0, 2.0, 3.0)
    assert spread(summary(native, native)) == pytest.approx(0.5)
    assert quartiles([5.0]) == (5.0, 5.0, 5.0)


def test_slope_of_a_power():
    assert slope([1, 2, 4, 8], [3 * x**1.5 for x in (1, 2, 4, 8)]) == pytest.approx(1.5)


def test_networks_are_what_their_names_say():
    networks = worksets.networks()
    assert len(worksets.resnet(1, 5)) == 32 and len(worksets.resnet50(1)) == 54
    assert [layer.patch for layer in networks["VGG-small b64"]] == [27, 288, 288, 576, 576, 1152, 128]
    assert networks["ResNet50 b2"][-2].output_size == 7
    model = [m for m in worksets.vgg_small().modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert [m.weight[0].numel() for m in model] == [layer.patch for layer in networks["VGG-small b64"]]


LAYERS = [
    worksets.conv("", 2, 4, 6, 8),
    worksets.conv("", 2, 4, 6, 9, 3, 2),
    worksets.conv("", 2, 4, 4, 8, 3, 1, 4),
    worksets.LayerShape("", 8, 5, 3),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.describe())
def test_baselines_compute_what_native_computes(layer):
    x = worksets.activation(layer)
    A = worksets.factor_a(layer)
    for method in (baselines.by_unfold, baselines.by_strides):
        assert worst_error([method(x, layer)], [A]) < 1e-5
    g = worksets.gradient(layer)
    assert worst_error([baselines.gradient_covariance(g)], [kfac_ext.gradient_covariance(g)]) < 1e-5


@pytest.mark.parametrize("method", ["inv", "eigh"])
def test_the_plain_recipe_of_kfac_is_one(method):
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Flatten(), torch.nn.Linear(12, 4)).double()
    x, y = torch.randn(6, 2, 4, 4, dtype=torch.float64), torch.arange(6) % 4
    with kfac_ext.Curvature(model, fisher_type="empirical", kfac_approx="expand", factor_update_steps=1) as curvature:
        curvature.trace(x)
        plain = baselines.HookedPreconditioner(model, method, damping=0.1, kl_clip=1e9, lr=0.1)
        torch.nn.functional.cross_entropy(model(x), y).backward()
    weight, bias = model[0].weight.grad, model[0].bias.grad
    gradient = torch.cat([weight.flatten(1), bias[:, None]], dim=1).T.flatten()
    eye = torch.eye(19, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    A, G = curvature.factors["0.A"], curvature.factors["0.G"]
    if method == "inv":
        block = torch.kron(A + 0.1 * eye[0], G + 0.1 * eye[1])
    else:
        block = torch.kron(A, G) + 0.1 * torch.kron(*eye)
    exact = torch.linalg.solve(block, gradient).view(19, 3).T
    plain.step()
    torch.testing.assert_close(model[0].weight.grad.flatten(1), exact[:, :-1])
    torch.testing.assert_close(model[0].bias.grad, exact[:, -1])


def test_a_wrong_variant_is_not_timed_and_a_wrong_native_fails():
    skipped = {}
    one, two = torch.ones(3), 2 * torch.ones(3)
    variants = {"native": lambda: [one], "plain": lambda: [one], "peer": lambda: [two]}
    assert list(agreeing(variants, "plain", skipped)) == ["native", "plain"]
    assert skipped == {"peer": "differs from plain by 1.0e+00"}
    with pytest.raises(AssertionError, match="native differs"):
        agreeing(variants | {"native": lambda: [two]}, "plain", {})


def test_absent_and_broken_peers_are_skipped_by_name():
    def breaks():
        raise RuntimeError("too new\nsecond line")

    makers = {"no_such_peer": lambda: int, "json": breaks, "math": lambda: int}
    steps, skipped = peers.available(makers)
    assert list(steps) == ["math"]
    assert skipped == {"no_such_peer": "not installed", "json": "fails: RuntimeError: too new"}


def test_a_json_is_never_half_written(tmp_path):
    path = tmp_path / "folder" / "some.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_tables_are_aligned_by_column():
    found = list(table(("a", "b", "c"), [(1, "x", 2.5)], "lr"))
    assert found == ["| a | b | c |", "| --- | ---: | ---: |", "| 1 | x | 2.5 |"]


CASE = {"suite": "s", "name": "one", "kind": "time", "unit": "s", "variants": {}, "skipped": {}}


def test_a_case_is_written_at_once_and_replaced_when_repeated(tmp_path):
    path = tmp_path / "r.json"
    results = Results(path, quick=True, fresh=False)
    results.add(CASE)
    results.add(CASE | {"name": "two"})
    assert [c["name"] for c in load(path)["cases"]] == ["one", "two"]  # as after an interruption
    assert load(path)["finished"] is None
    again = Results(path, quick=True, fresh=False)
    again.add(CASE | {"rounds": 9})
    again.finish()
    found = load(path)
    assert [(c["name"], c.get("rounds")) for c in found["cases"]] == [("one", 9), ("two", None)]
    assert found["finished"] and found["machine"]["threads"] == torch.get_num_threads()
    Results(path, quick=True, fresh=True).add(CASE)
    assert len(load(path)["cases"]) == 1


def test_cases_of_another_machine_are_not_mixed_in(tmp_path):
    path = tmp_path / "r.json"
    Results(path, quick=True, fresh=False).add(CASE)
    other = json.loads(path.read_text())
    other["machine"]["cpu"] = "another"
    path.write_text(json.dumps(other))
    assert Results(path, quick=True, fresh=False).cases == []
