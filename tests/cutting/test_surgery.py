from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatprune.pruning.pruner
from flatprune.coupling import PRODUCER, NeuronGroup, find_coupling
from flatprune.criteria import saliency
from flatprune.cutting import surgery
from flatprune.export.saved import take_tensors
from tests.pruning.pruning_networks import NETWORKS, Run, chain, digits, masked, mlp


def outputs(model: nn.Module) -> Tensor:
    """The model's outputs on digits in evaluation mode; its mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.no_grad():
        result = model.eval()(digits()[0][:200])
    for module, mode in modes:
        module.training = mode
    return result


@pytest.mark.parametrize("name", NETWORKS)
def test_every_removal_of_a_training_equals_zeroed_neurons(name, monkeypatch):
    checked = []

    def checking_plan(model, coupling, pruned, **options):
        with masked(model, coupling, pruned):
            expected = outputs(model)
        result = surgery.plan(model, coupling, pruned, **options)
        commit = result.commit

        def checked_commit() -> None:
            commit()
            torch.testing.assert_close(outputs(model), expected, rtol=1e-4, atol=1e-4)
            assert expected.std() > 1e-2
            checked.append(sum(map(len, pruned.values())))

        monkeypatch.setattr(result, "commit", checked_commit)
        return result

    monkeypatch.setattr(flatprune.pruning.pruner, "plan", checking_plan)
    torch.manual_seed(0)
    run = Run(NETWORKS[name]())
    run.train(10)
    run.prune(150, params=0.3, compensate=False).train(70)
    assert len(checked) >= 2
    assert min(checked) > 0
    assert run.pruner.params <= 1.01 * 0.3 * run.pruner.params_start


def some_of(group: NeuronGroup) -> Tensor:
    """A neuron or two of each of its slices."""
    return torch.cat([(group.group_of == part).nonzero()[1:3, 0] for part in range(group.groups)])


@pytest.mark.parametrize("name", NETWORKS)
def test_removal_of_each_group_alone_equals_zeroed_neurons(name):
    torch.manual_seed(1)
    source = NETWORKS[name]()
    outputs(source.train())
    found = find_coupling(source, digits()[0][:2])
    for position in range(len(found.groups)):
        model, coupling = copy.deepcopy((source, found))
        groups = coupling.groups
        pruned = {position: some_of(groups[position])}
        with masked(model, coupling, pruned):
            expected = outputs(model)
        surgery.plan(model, coupling, pruned).commit()
        torch.testing.assert_close(outputs(model), expected, rtol=1e-4, atol=1e-5)
        if position not in (0, len(groups) - 1):  # finding takes longest
            continue
        again = find_coupling(model, digits()[0][:2]).groups
        assert [group.name for group in again] == [group.name for group in groups]
        for kept, fresh in zip(groups, again):
            if kept.width > kept.groups:  # slices of one neuron ask for nothing any more
                assert torch.equal(kept.group_of, fresh.group_of)
            for a, b in zip(kept.members, fresh.members):
                assert (a.names, a.dim, a.groups, a.roles, a.size) == (b.names, b.dim, b.groups, b.roles, b.size)
                assert torch.equal(a.index, b.index)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adagrad fused": lambda p: torch.optim.Adagrad(p, lr=1e-2, fused=True),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adamax": lambda p: torch.optim.Adamax(p),
    "asgd": lambda p: torch.optim.ASGD(p),
    "rprop": lambda p: torch.optim.Rprop(p),
    "adafactor": lambda p: torch.optim.Adafactor(p),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_states_and_gradients_are_cut_and_training_goes_on(kind):
    torch.manual_seed(0)
    model = mlp(12, 8)
    run = Run(model, OPTIMIZERS[kind](model.parameters()))
    run.train(3)
    x, y = digits()
    loss = F.cross_entropy(model(x), y)  # kept alive over the removal, as in every training loop
    loss.backward()
    weight = model[3].weight  # [8, 12]
    before = {key: value.clone() for key, value in run.optimizer.state[weight].items() if isinstance(value, Tensor)}
    gradient, bias_gradient = weight.grad.clone(), model[3].bias.grad.clone()
    coupling = find_coupling(model, x[:2])
    pruned = {0: torch.tensor([0, 5, 11]), 1: torch.tensor([2, 3])}
    surgery.plan(model, coupling, pruned, optimizer=run.optimizer, curvature=run.curvature).commit()
    columns, rows = [1, 2, 3, 4, 6, 7, 8, 9, 10], [0, 1, 4, 5, 6, 7]
    assert model[3].weight is weight
    assert torch.equal(weight.grad, gradient[rows][:, columns])
    assert torch.equal(model[3].bias.grad, bias_gradient[rows])
    tensors = 0
    for key, value in before.items():
        expected = value[rows] if len(value.shape) == 2 and value.shape[0] == 8 else value  # of Adafactor [8, 1]
        expected = expected[:, columns] if len(value.shape) == 2 and value.shape[1] == 12 else expected
        assert torch.equal(run.optimizer.state[weight][key], expected)
        tensors += value.dim() > 0
    assert tensors >= 1
    assert all(p.grad.shape == p.shape for p in model.parameters())
    run.train(3)  # the new graph is built while `loss` still holds the old one
    assert loss.grad_fn is not None
    assert (model[1].out_features, model[3].in_features, model[3].out_features) == (9, 9, 6)


def test_factors_and_eigenvectors_are_cut():
    torch.manual_seed(0)
    model = chain()
    run = Run(model)
    run.train(3)
    coupling = find_coupling(model, digits()[0][:2])
    before = {key: run.curvature.factors[key].clone() for key in run.curvature.factors}
    surgery.plan(model, coupling, {1: torch.tensor([0, 4])}, curvature=run.curvature).commit()
    factors = run.curvature.factors
    kept = [1, 2, 3, *range(5, 12)]
    columns = [c * 16 + s for c in kept for s in range(16)] + [12 * 16]
    assert torch.equal(factors["3.G"], before["3.G"][kept][:, kept])
    assert torch.equal(factors["8.A"], before["8.A"][columns][:, columns])
    assert torch.equal(factors["8.G"], before["8.G"])
    run.curvature.spectral_radii()  # brings the eigenpairs up to date
    for key in ("3.G", "8.A"):
        vector, value = factors.vector(key), factors.eigenvalue(key)
        assert float(vector.norm()) == pytest.approx(1, abs=1e-4)
        assert float(value) == pytest.approx(float(torch.linalg.eigvalsh(factors[key])[-1]), rel=0.05)


def test_factors_of_grouped_and_depthwise_convolutions_are_cut():
    torch.manual_seed(0)
    for name, layer, pruned, share in (
        ("grouped", "grouped", {0: torch.tensor([0, 5, 9]), 1: torch.tensor([2, 6, 17])}, 3),
        ("depthwise", "depthwise", {0: torch.tensor([1, 7])}, None),
    ):
        run = Run(NETWORKS[name]())
        run.train(3)
        A, G = (run.curvature.factors[f"{layer}.{side}"].clone() for side in "AG")
        coupling = find_coupling(run.model, digits()[0][:2])
        surgery.plan(run.model, coupling, pruned, optimizer=run.optimizer, curvature=run.curvature).commit()
        if share is None:
            kept = [c for c in range(12) if c not in (1, 7)]
            expected_A, expected_G = A[kept], G[kept]
        else:
            inputs = [[1, 2, 3], [0, 2, 3], [0, 2, 3]]
            outputs_kept = [[0, 1, 3, 4, 5], [1, 2, 3, 4, 5], [0, 1, 2, 3, 4]]
            columns = [[c * 9 + s for c in block for s in range(9)] + [36] for block in inputs]
            expected_A = torch.stack([a[c][:, c] for a, c in zip(A, columns)])
            expected_G = torch.stack([g[r][:, r] for g, r in zip(G, outputs_kept)])
        assert torch.equal(run.curvature.factors[f"{layer}.A"], expected_A)
        assert torch.equal(run.curvature.factors[f"{layer}.G"], expected_G)
        run.train(12)  # an update of the factors included


class _InjectedError(Exception):
    pass


def _snapshot(run: Run) -> dict:
    """Everything that a removal may touch, copied."""
    factors = run.curvature.factors
    attributes = ("in_features", "out_features", "in_channels", "out_channels", "groups", "num_features")
    return {
        "tensors": {k: v.clone() for k, v in run.model.state_dict().items()},
        "ids": [id(p) for p in run.model.parameters()],
        "grads": [p.grad.clone() for p in run.model.parameters()],
        "states": copy.deepcopy([run.optimizer.state[p] for p in run.model.parameters()]),
        "factors": [factors.buffer.clone(), factors.vectors.clone(), factors.eigenvalues.clone(), dict(factors.sizes)],
        "indices": [m.index.clone() for g in run.pruner.groups for m in g.members],
        "attributes": [getattr(m, a, None) for m in run.model.modules() for a in attributes],
        "counters": (run.pruner.step_count, len(run.pruner.history), run.curvature.step_count),
    }


def _assert_same(a: object, b: object) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            _assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            _assert_same(x, y)
    else:
        assert a == b


def _counted(function, fail_at: int):
    calls = [0]

    def wrapped(*args, **kwargs):
        calls[0] += 1
        if calls[0] > fail_at:
            raise _InjectedError
        return function(*args, **kwargs)

    return wrapped


POINTS = {
    "cut": (surgery, "cut_tensor"),
    "index": (surgery, "renumbered"),
    "factors": (surgery, "_plan_factors"),
    "attributes": (surgery, "known_attributes"),
    "narrowing": (None, "narrowed"),
    "compensation": (saliency.kfac_ext, "compensate"),
    "greedy": (saliency.kfac_ext.GreedySelection, "remove_"),
    "inverse": (saliency, "damped_inverses"),
    "scores": (saliency.kfac_ext, "obs_saliency"),
}


@pytest.mark.parametrize("point", POINTS)
def test_an_error_at_any_point_changes_nothing(point, monkeypatch):
    torch.manual_seed(0)
    selection = "independent" if point in ("scores", "compensation") else "auto"
    run = Run(chain(), None).prune(100, params=0.3, selection=selection)
    run.train(19)
    assert run.pruner.step_count + 1 == run.pruner.schedule.events[0]
    owner, name = POINTS[point]
    owner = type(run.curvature.factors) if owner is None else owner
    before = _snapshot(run)
    failures = 0
    while True:  # fail at the first call, then at the second, ... until the event gets through
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, _counted(getattr(owner, name), failures))
            try:
                records = run.pruner.step()
            except _InjectedError:
                failures += 1
                _assert_same(before, _snapshot(run))
                continue
        break
    assert failures >= 1
    assert records[0].removed > 0
    run.train(5)


@pytest.mark.parametrize(
    ("pruned", "message"),
    [([0, 0], "distinct"), ([12], r"\[0, 12\)"), ([-1], r"\[0, 12\)"), (range(12), "one must stay")],
)
def test_impossible_removals_are_refused(pruned, message):
    model = mlp(12)
    coupling = find_coupling(model, digits()[0][:2])
    with pytest.raises(ValueError, match=message):
        surgery.plan(model, coupling, {0: torch.tensor(list(pruned))})


def test_uneven_shares_of_a_grouped_convolution_are_refused():
    model = NETWORKS["grouped"]()
    coupling = find_coupling(model, digits()[0][:2])
    with pytest.raises(ValueError, match=r"'first': \[2, 1, 0\] neurons"):
        surgery.plan(model, coupling, {0: torch.tensor([0, 1, 4])})


def test_bad_replacements_are_refused():
    model = mlp(12)
    coupling = find_coupling(model, digits()[0][:2])
    pruned = {0: torch.tensor([1])}
    with pytest.raises(ValueError, match=r"3\.weight: replacement is \(10, 11\)"):
        surgery.plan(model, coupling, pruned, replacements={"3.weight": torch.zeros(10, 11)})
    with pytest.raises(ValueError, match=r"3\.bias: its compensated values are not finite"):
        surgery.plan(model, coupling, pruned, replacements={"3.bias": torch.full((10,), torch.nan)})


@pytest.mark.parametrize("name", NETWORKS)
def test_tensors_and_attributes_rebuild_a_pruned_network(name):
    torch.manual_seed(0)
    run = Run(NETWORKS[name]())
    run.train(2)
    run.prune(60, params=0.4).train(30)
    fresh = NETWORKS[name]()
    take_tensors(fresh, run.model.state_dict(), run.pruner.state_dict()["attributes"])
    assert repr(fresh) == repr(run.model)
    assert torch.equal(outputs(fresh), outputs(run.model))


def test_channels_last_weights_stay_channels_last():
    model = chain().to(memory_format=torch.channels_last)
    coupling = find_coupling(model, digits()[0][:2])
    surgery.plan(model, coupling, {0: torch.tensor([0, 1])}).commit()
    assert model[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert len(coupling.groups[0].of_role(PRODUCER)[0].index) == 6
