"""Copies of the model, such as averaged weights, are cut with it."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flatprune.coupling import find_coupling
from flatprune.cutting import surgery
from flatprune.pruning.pruner import Pruner
from flatprune.pruning.targets import Target
from flatprune.training.averaging import AveragedWeights
from kfac_ext import Curvature
from tests.pruning.pruning_networks import NETWORKS, Run, chain, digits, mlp, sgd


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore:Curvature")
def test_a_copy_that_nothing_updates_is_the_masked_copy(name):
    torch.manual_seed(0)
    model = NETWORKS[name]()
    model(digits()[0][:64])
    ema_model = copy.deepcopy(model)
    coupling = find_coupling(model, digits()[0][:2])
    groups = coupling.groups
    pruned = {0: torch.cat([(groups[0].group_of == p).nonzero()[1:3, 0] for p in range(groups[0].groups)])}
    with torch.no_grad():
        for parameter in ema_model.parameters():  # so that cutting the model's values into it would be seen
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    expected = copy.deepcopy(ema_model)
    surgery.plan(expected, copy.deepcopy(coupling), pruned).commit()
    surgery.plan(model, coupling, pruned, ema_models=[ema_model]).commit()
    assert shapes(ema_model) == shapes(model)
    assert repr(ema_model) == repr(model)
    for key, tensor in expected.state_dict().items():
        assert torch.equal(ema_model.state_dict()[key], tensor), key


@pytest.mark.parametrize("network", [mlp, chain])
def test_averaged_weights_of_a_whole_training(network):
    torch.manual_seed(0)
    model = network()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    run = Run(model).prune(150, params=0.2, compensate=True, ema_models=[ema])
    start = run.pruner.params
    for _ in range(100):
        run.train(1)
        ema.update_parameters(model)
    assert run.pruner.params <= 1.01 * 0.2 * start
    assert shapes(ema.module) == shapes(model)
    x, y = digits()
    with torch.no_grad():
        accuracy = float((ema.module.eval()(x).argmax(1) == y).float().mean())
    assert accuracy > 0.8


class Holder(nn.Module):
    """As averages of other libraries are: the copy is its `module`, here in another precision."""

    def __init__(self, model):
        super().__init__()
        self.module = copy.deepcopy(model).double()


def test_a_module_that_holds_a_copy_stands_for_it():
    model = nn.Sequential()
    model.module = mlp(12, 8)  # called alike in the model
    coupling = find_coupling(model, digits()[0][:2])
    held, bare = Holder(model), copy.deepcopy(model)
    surgery.plan(model, coupling, {0: torch.tensor([3])}, ema_models=[held, bare]).commit()
    assert shapes(held.module) == shapes(bare) == shapes(model)
    assert held.module.module[1].weight.dtype == torch.float64
    assert torch.equal(held.module.module[1].weight.float(), model.module[1].weight)


def test_compensation_moves_a_copy_as_much_as_the_model():
    torch.manual_seed(0)
    model = mlp(12, 8)
    ema_model = copy.deepcopy(model)
    with torch.no_grad():
        ema_model[3].weight.mul_(2.0)
    coupling = find_coupling(model, digits()[0][:2])
    before = model[3].weight.detach().clone()
    moved = {"3.weight": before + 0.5, "3.bias": model[3].bias.detach() + 1.0}
    bias = ema_model[3].bias.detach().clone()
    surgery.plan(model, coupling, {0: torch.tensor([3])}, replacements=moved, ema_models=[ema_model]).commit()
    kept = [0, 1, 2, *range(4, 12)]
    torch.testing.assert_close(ema_model[3].weight.detach(), (2.0 * before + 0.5)[:, kept])
    torch.testing.assert_close(ema_model[3].bias.detach(), bias + 1.0)


def test_what_is_no_copy_is_refused():
    model = mlp(12, 8)
    arguments = {"target": Target(0.5), "total_steps": 100}
    for ema_models, error, message in (
        ([mlp(12, 9)], ValueError, r"ema_models\[0\]: '3.weight' has shape \(9, 12\), \(8, 12\) in the model"),
        ([copy.deepcopy(model), chain()], ValueError, r"ema_models\[1\]: '1.weight' has shape"),
        ([nn.Sequential(model)], ValueError, r"ema_models\[0\]: '1.weight' is only in the model"),
        (
            [SimpleNamespace(decay=0.9, ema=copy.deepcopy(model))],
            TypeError,
            r"expected a torch.nn.Module: give its \.ema",
        ),
        ([model], ValueError, r"ema_models\[0\]: '1.weight' is the model's own tensor"),
        ([3], TypeError, r"ema_models\[0\] is int"),
        (copy.deepcopy(model), TypeError, "ema_models is Sequential, expected a list"),
    ):
        with pytest.raises(error, match=message):
            Pruner(model, sgd(model), Curvature(model), digits()[0][:2], ema_models=ema_models, **arguments)


def test_a_copy_that_was_changed_stops_the_removal():
    ema_model = mlp(12, 8)
    run = Run(mlp(12, 8)).prune(50, params=0.5, ema_models=[ema_model])
    ema_model[1].weight.data = ema_model[1].weight.data[:7]
    before = shapes(run.model)
    with pytest.raises(ValueError, match=r"ema_models\[0\]: '1.weight' has shape \(7, 64\)"):
        run.train(30)
    assert shapes(run.model) == before


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_that_averages_nothing_is_refused(decay):
    with pytest.raises(ValueError, match=r"AveragedWeights: decay is .*, expected 0 <= decay < 1"):
        AveragedWeights(nn.Linear(2, 2), decay)
