"""Targets in every unit: the count on paper, the budget at each event, the end."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from flatprune.coupling import Member, NeuronGroup, find_coupling
from flatprune.cutting import surgery
from flatprune.pruning import latency
from flatprune.pruning.costs import LatencyModel, MacCount, NeuronCount, ParameterCount
from flatprune.pruning.latency import LatencyTable
from flatprune.pruning.limits import Limits
from flatprune.pruning.pruner import Pruner
from flatprune.pruning.schedule import CubicSchedule
from flatprune.pruning.targets import Target, amount
from kfac_ext import Curvature
from kfac_ext.layers import kind_of
from kfac_ext.layers.convolution import TRANSPOSED
from tests.pruning.pruning_networks import NETWORKS, Attention, Run, digits, mlp, sgd


class Sequence(nn.Module):
    """Linear layers on [n, 8, d], a strided grouped convolution before, and a layer that sees only a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, stride=(2, 1), padding=1)
        self.grouped = nn.Conv2d(8, 12, (1, 3), stride=2, padding=(0, 1), groups=4)
        self.inner = nn.Linear(12, 24)
        self.outer = nn.Linear(24, 16, bias=False)
        self.query = nn.Parameter(torch.ones(1, 3))
        self.constant = nn.Linear(3, 5)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.grouped(torch.relu(self.first(x)))).flatten(2).transpose(1, 2)  # [n, 8, 12]
        x = self.outer(torch.relu(self.inner(x))).mean(dim=1)
        return self.head(x) + self.constant(self.query).sum()


ALL = {**NETWORKS, "sequence": Sequence}


def counted_by_hooks(model: nn.Module) -> int:
    """Multiplications by weights in one forward on one image, counted at the tensors that really pass."""
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        # each output is a product with one row of the weight; of a transposed convolution, each input meets one
        values = inputs[0] if isinstance(module, TRANSPOSED) else output
        total += values.numel() * module.weight[0].numel()

    handles = [m.register_forward_hook(count) for m in model.modules() if kind_of(m) is not None]
    with torch.no_grad():
        model.eval()(digits()[0][:1])
    for handle in handles:
        handle.remove()
    return total


def products_of_attention(model: nn.Module) -> int:
    """Multiplications of activations by activations: queries by keys, weights by values, over 8 tokens."""
    return sum(2 * m.num_heads * m.head_dim * 8 * 8 for m in model.modules() if isinstance(m, Attention.Heads))


def random_removal(groups: list[NeuronGroup], seed: int) -> dict[int, Tensor]:
    """Some neurons of every group, the same number from each slice."""
    generator = torch.Generator().manual_seed(seed)
    pruned = {}
    for position, group in enumerate(groups):
        rounds = int(torch.randint(0, group.width // group.groups, (1,), generator=generator))
        parts = [(group.group_of == part).nonzero().flatten()[:rounds] for part in range(group.groups)]
        if rounds:
            pruned[position] = torch.cat(parts).sort().values
    return pruned


@pytest.mark.parametrize("name", ALL)
def test_multiply_accumulates_on_paper_are_those_after_the_cut(name):
    source = ALL[name]()
    found = find_coupling(source, digits()[0][:3])
    changed = 0
    for seed in range(4):
        model, coupling = copy.deepcopy((source, found))
        groups = coupling.groups
        count = MacCount(groups, coupling.macs)
        assert count.cost == counted_by_hooks(model) + products_of_attention(model)
        pruned = random_removal(groups, seed)
        for position, neurons in pruned.items():
            before = count.cost
            expected = count.cost_without(position, len(neurons))
            assert count.cost == before
            count.remove(position, len(neurons))
            assert count.cost == expected
        surgery.plan(model, coupling, pruned).commit()
        assert count.cost == counted_by_hooks(model) + products_of_attention(model)
        assert count.cost == MacCount(groups, coupling.macs).cost
        if seed % 2:  # finding takes longest
            again = find_coupling(model, digits()[0][:1])
            assert count.cost == MacCount(again.groups, again.macs).cost
        changed += bool(pruned)
    assert changed >= 3


def test_neurons_are_those_of_the_groups():
    model = NETWORKS["depthwise"]()
    count = NeuronCount(find_coupling(model, digits()[0][:2]).groups)
    assert count.cost == 12 + 16
    count.remove(1, 5)
    assert count.cost == 23
    assert count.neuron_costs() == [1, 1]


UNITS = [{"macs": 0.4}, {"neurons": 0.4}]


@pytest.mark.filterwarnings("ignore:Curvature")
@pytest.mark.parametrize("name", ["mlp", "chain", "grouped", "sequence"])
@pytest.mark.parametrize("fractions", UNITS, ids=lambda fractions: next(iter(fractions)))
@pytest.mark.parametrize("selection", ["independent", "greedy"])
def test_the_target_is_reached_and_missed_by_less_than_a_bundle(name, fractions, selection):
    torch.manual_seed(0)
    options = {"selection": selection, "target": Target(**fractions)}
    run = Run(ALL[name]()).prune(20, **options)  # a single event, of several cuts
    pruner, unit = run.pruner, next(iter(fractions))
    start = pruner.cost
    records = run.train(10)
    goal = fractions[unit] * start
    assert pruner.cost <= 1.01 * goal
    paper, positions = pruner._tracker.on_paper(), {group.name: p for p, group in enumerate(pruner.groups)}
    one_more_is_too_many = [
        paper.cost_without(positions[record.layer], -pruner.groups[positions[record.layer]].groups) > goal
        for record in records
        if record.round == records[-1].round
    ]
    # One after the other, a small neuron may have been pruned before a large one that ended it.
    assert any(one_more_is_too_many) and (selection == "greedy" or all(one_more_is_too_many))
    assert all(r.unit == unit and r.budget < r.cost_before and isinstance(r.budget, int) for r in records)
    assert records[-1].cost_after == pruner.cost
    if unit == "macs":
        assert pruner.cost == counted_by_hooks(run.model)


def test_scores_are_divided_by_what_the_target_counts():
    """The neurons of a Linear behind 16 positions have many parameters and do little work."""
    left = {}
    for fractions in ({"params": 0.3}, {"macs": 0.3}):
        torch.manual_seed(0)
        run = Run(NETWORKS["chain"]()).prune(100, target=Target(**fractions))
        run.train(45)
        left[next(iter(fractions))] = run.pruner.widths()
    assert left["macs"]["8"] == 20 > left["params"]["8"]
    assert left["macs"]["3"] > left["params"]["3"]  # read by that Linear


def test_the_least_that_can_be_reached_is_known_in_every_unit():
    weights = 8 * (64 + 8 + 10)
    for unit, reachable in (("params", weights + 8 + 8 + 10), ("macs", weights), ("neurons", 16)):
        run = Run(mlp(24, 16)).prune(100, target=Target(**{unit: 0.01}), min_width=5, round_to=8)
        assert run.pruner.reachable() == reachable
        with pytest.warns(UserWarning, match=f"out of reach: {reachable} are left with min_width=5, round_to=8"):
            run.train(45)
        assert run.pruner.cost == reachable


TICK = 2.0**-30


@pytest.fixture
def fake_clock(monkeypatch):
    """Ticks that are exact in float: 1000 a forward, 10 a multiply-accumulate of one sample, 1 an output."""
    state = {"now": 0, "slow": 1}

    def tick(module: nn.Module, _inputs: object, output: Tensor) -> None:
        state["now"] += state["slow"] * (10 * module.weight[0].numel() + 1) * output.numel() // len(output)

    def start(_module: nn.Module, _inputs: object) -> None:
        state["now"] += 1000

    def watch(model: nn.Module) -> nn.Module:
        model.register_forward_pre_hook(start)
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.register_forward_hook(tick)
        return model

    monkeypatch.setattr(latency, "_clock", lambda: state["now"] * TICK)
    monkeypatch.setattr(latency, "_MOST_REPEATS", 5)
    state["watch"] = watch
    return state


def timed(model: nn.Module) -> float:
    return TICK * (1000 + 10 * counted_by_hooks(model))


@pytest.mark.parametrize("name", ["mlp", "chain", "grouped"])
def test_the_latency_target_holds_for_the_clock(fake_clock, name):
    torch.manual_seed(0)
    run = Run(fake_clock["watch"](NETWORKS[name]())).prune(100, target=Target(latency=0.5, latency_batch=4))
    pruner = run.pruner
    start = pruner.measured_latency()
    assert pruner.cost_start == pytest.approx(start)
    assert start == pytest.approx(timed(copy.deepcopy(run.model)), rel=0.05)
    records = run.train(45)
    assert 0.4 * start < pruner.measured_latency() <= 1.01 * 0.5 * start
    assert pruner.cost == pytest.approx(pruner.measured_latency())  # scaled to what was found at the end
    assert all(r.unit == "latency" for r in records) and records[-1].cost_after <= 1.01 * records[-1].budget


def test_removal_goes_on_until_the_measured_latency_holds(fake_clock):
    """Half-way the machine becomes twice as slow as the table knows."""
    torch.manual_seed(0)
    run = Run(fake_clock["watch"](mlp(64, 48))).prune(100, target=Target(latency=0.5))
    run.train(35)
    fake_clock["slow"] = 2
    run.train(10)
    assert run.pruner.measured_latency() <= 1.01 * 0.5 * run.pruner.cost_start


def test_a_latency_run_goes_on_from_its_table(fake_clock):
    """What was measured at the start decides after a resume too, on a machine of another speed."""

    def start() -> Run:
        torch.manual_seed(0)
        model = fake_clock["watch"](mlp(40, 30))
        return Run(model).prune(300, target=Target(latency=0.4))

    straight = start()
    straight.train(100)
    first = start()
    first.train(65)
    assert first.pruner.history
    parts = ("model", "optimizer", "curvature", "pruner")
    buffer = io.BytesIO()
    torch.save({part: getattr(first, part).state_dict() for part in parts}, buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    fake_clock["slow"] = 3
    model = fake_clock["watch"](mlp(40, 30))
    own = model.state_dict(keep_vars=True)
    for key, tensor in state["model"].items():
        own[key].data = tensor
    surgery.sync_attributes(model)
    second = Run(model).prune(300, target=Target(latency=0.4))
    for part in parts[1:]:
        getattr(second, part).load_state_dict(state[part])
    second.step_count = 65
    second.train(35)
    assert second.pruner.history == straight.pruner.history
    assert second.pruner.cost_start == straight.pruner.cost_start


def test_latency_is_really_measured():
    """No fake: a network of 64 times the work takes longer, and a table of it predicts less for a cut one."""
    small, large = mlp(16, 16).eval(), mlp(1024, 1024).eval()
    x = (digits()[0][:256],)
    assert latency.measure(small, x) < latency.measure(large, x)
    coupling = find_coupling(large, x[0][:2])
    layers = ["1", "3", "5"]

    def work_of(groups):
        return LatencyModel(groups, coupling.macs, layers, LatencyTable()).work()

    table = latency.measure_table(large, coupling, x, layers, Limits(), work_of)
    model = LatencyModel(coupling.groups, coupling.macs, layers, table)
    assert 0.0 < model.cost_without(0, 900) < model.cost
    assert all(cost > 0.0 for cost in model.neuron_costs())
    assert LatencyTable.from_state(table.state_dict()) == table


def test_curves_ascend_and_are_linear_between_points():
    curve = latency._ascending([(4.0, 2.0), (1.0, 1.0), (2.0, 3.0), (1.0, 0.5)])
    assert curve == [(1.0, 1.0), (2.0, 3.0), (4.0, 3.0)]
    values = [latency._interpolate(curve, work) for work in (0.0, 1.0, 1.5, 2.0, 3.0, 9.0)]
    assert values == [1.0, 1.0, 2.0, 3.0, 3.0, 3.0]


def test_batches_repeat_the_examples():
    x, other = torch.arange(3.0)[:, None], torch.ones(5)
    found = latency.batch_of((x, other, 7), 5)
    assert found[0].flatten().tolist() == [0, 1, 2, 0, 1]
    assert found[1] is other and found[2] == 7


def test_copies_for_timing_are_cut_within_the_limits():
    model = NETWORKS["grouped"]()
    coupling = find_coupling(model, digits()[0][:2])
    groups = coupling.groups
    before = [group.width for group in groups]
    for fraction, widths in ((1.0, before), (0.0, [6, 6, 4, 4][: len(before)])):
        cut, own = latency._cut_copy(model, coupling, Limits(2, 3), fraction)
        assert [group.width for group in own] == widths
        cut.eval()(digits()[0][:2])
    assert [group.width for group in groups] == before


def test_budgets_of_latency_are_not_rounded():
    schedule = CubicSchedule(1000)
    budgets = [schedule.budget(step, 0.01, 0.005) for step in schedule.events]
    assert budgets == sorted(budgets, reverse=True) and budgets[-1] == 0.005
    assert budgets[4] == pytest.approx(0.005 + 0.005 * (1 - 5 / 15) ** 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing given, expected one of params, macs, neurons, latency"),
        ({"params": 0.1, "macs": 0.3}, "params and macs given, expected one of"),
        ({"macs": 1.5}, "macs is 1.5, expected a number above 0 and at most 1"),
        ({"neurons": 0}, "neurons is 0"),
        ({"latency": float("nan")}, "latency is nan"),
        ({"latency": "half"}, "latency is 'half'"),
        ({"latency": 0.5, "latency_batch": 0}, "latency_batch is 0, expected an integer of 1 or more"),
    ],
)
def test_bad_targets_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Target(**arguments)


def test_a_target_knows_its_unit():
    target = Target(macs=0.25)
    assert (target.unit, target.fraction, target.goal(1002)) == ("macs", 0.25, 250)
    assert Target(latency=0.25).goal(0.01) == 0.0025
    assert amount("latency", 0.00123) == "1.23 ms" and amount("neurons", 12) == "12"


def test_a_state_of_another_unit_is_refused():
    run = Run(mlp()).prune(100, target=Target(macs=0.5))
    run.train(5)
    with pytest.raises(ValueError, match="target is"):
        Run(mlp()).prune(100, target=Target(params=0.5)).pruner.load_state_dict(run.pruner.state_dict())


def test_members_of_a_count_may_be_any_layers():
    """A group whose member is a norm without weights counts no parameters for it."""
    norm = nn.BatchNorm1d(4, affine=False)
    model = nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 2))
    index = torch.arange(4)[:, None]
    owned = (("0.weight", 0, "producer"), ("0.bias", 0, "channelwise"), ("2.weight", 1, "consumer"))
    group = NeuronGroup("0", [Member((name,), dim, 1, frozenset({role}), index, 4) for name, dim, role in owned])
    assert ParameterCount(model, [group]).cost_without(0, 1) == 3 * 3 + 3 + 3 * 2 + 2


def test_no_pruner_for_what_is_no_target():
    model = mlp()
    with pytest.raises(TypeError, match=r"expected a flatprune\.Target"):
        Pruner(model, sgd(model), Curvature(model), digits()[0][:2], target={"macs": 0.5}, total_steps=10)
