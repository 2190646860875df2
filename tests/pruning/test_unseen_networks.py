"""Networks nobody thought of: pruned as the masked one computes and trainable after, or refused with the reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import flatprune.pruning.pruner
from flatprune.cutting import surgery
from flatprune.pruning.pruner import Pruner
from flatprune.pruning.targets import Target
from kfac_ext import Curvature, KFACPreconditioner
from tests.conftest import thorough
from tests.pruning.pruning_networks import masked, sgd
from tests.pruning.unseen_networks import CASES, inputs_of

pytestmark = pytest.mark.filterwarnings("ignore:Pruner|Curvature|KFACPreconditioner")
STEPS = 24


def made(name):
    torch.manual_seed(0)
    case = CASES[name]
    model, (x, y) = case.build(), (inputs_of(case, 48), torch.arange(48) % 10)
    return model.train(), x, y


@pytest.mark.parametrize("name", CASES)
def test_pruned_equals_masked_and_trains(name, monkeypatch):
    model, x, y = made(name)
    curvature = Curvature(model, generator=torch.Generator().manual_seed(0))
    checked = []

    def outputs():
        model.eval()
        with curvature.paused(), torch.no_grad():
            found = model(*x)
        model.train()
        return found

    def checking_plan(model, coupling, pruned, **options):
        full = outputs()
        with masked(model, coupling, pruned, where_made=CASES[name].joint):
            expected = outputs()
        result = surgery.plan(model, coupling, pruned, **options)
        commit = result.commit

        def checked_commit():
            commit()
            effect = float((expected - full).abs().max())
            torch.testing.assert_close(outputs(), expected, rtol=0, atol=max(1e-3 * effect, 1e-6))
            checked.append(effect)

        monkeypatch.setattr(result, "commit", checked_commit)
        return result

    monkeypatch.setattr(flatprune.pruning.pruner, "plan", checking_plan)
    optimizer = sgd(model, 0.02)
    options = {"total_steps": STEPS, "criterion": CASES[name].criterion, "compensate": False}
    pruner = Pruner(model, optimizer, curvature, tuple(v[:2] for v in x), target=Target(0.3), **options)
    assert {group.name for group in pruner.groups} == CASES[name].groups
    for layer, words in CASES[name].refused.items():
        assert words in pruner.refused[layer]
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses.append(F.cross_entropy(model(*x), y))
        losses[-1].backward()
        optimizer.step()
        pruner.step()
    assert checked
    assert max(checked) > 1e-4
    assert all(curvature.factors[f"{name}.G"].shape[-1] * x.groups == x.outputs for name, x in curvature.layers.items())
    assert pruner.params == min(pruner.params_start, sum(p.numel() for p in model.parameters())) < pruner.params_start
    after = losses[-(STEPS // 2) :]  # pruning ends at 40 % of the steps
    assert after[-1] < after[0]


@pytest.mark.parametrize("criterion", thorough(["obs", "kron_obs", "gate_fisher"], but=["obs"]))
def test_compensation_of_unseen_networks_is_finite_and_trains(criterion):
    for name in ("nested", "unet", "squeeze", "sequence norms", "dense blocks", "two inputs", "class token"):
        model, x, y = made(name)
        curvature, optimizer = Curvature(model), sgd(model, 0.02)
        options = {"target": Target(0.5), "total_steps": STEPS, "criterion": criterion}
        pruner = Pruner(model, optimizer, curvature, tuple(v[:2] for v in x), **options)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(*x), y)
            loss.backward()
            optimizer.step()
            pruner.step()
        assert loss.isfinite()
        assert pruner.params < pruner.params_start


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("tied", "weight norm", "masked weights")])
def test_the_preconditioner_trains_unseen_networks(name, approx):
    model, x, y = made(name)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    preconditioner = KFACPreconditioner(model, kfac_approx=approx, damping=0.03)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        losses.append(F.cross_entropy(model(*x), y))
        losses[-1].backward()
        preconditioner.step()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_the_preconditioner_names_layers_that_share_a_weight():
    model, x, _ = made("tied")
    preconditioner = KFACPreconditioner(model)
    with pytest.raises(ValueError, match="weight of layer '2' is shared by the modules '2', '4'"):
        model(*x)
        preconditioner.step()


def test_lazy_layers_must_have_seen_an_input():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(12), torch.nn.ReLU(), torch.nn.LazyLinear(10))
    with pytest.raises(ValueError, match=r"1\.weight is uninitialised \(lazy\); run one forward first"):
        Curvature(model)
    model(torch.randn(2, 1, 8, 8))
    pruner = Pruner(model, None, Curvature(model), torch.randn(2, 1, 8, 8), target=Target(0.5), total_steps=10)
    assert set(pruner.widths()) == {"1"}


def test_an_output_in_a_dict_is_read():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 12), torch.nn.ReLU(), torch.nn.Linear(12, 10))
    model.register_forward_hook(lambda _module, _inputs, output: {"logits": output})
    pruner = Pruner(model, None, Curvature(model), torch.randn(2, 1, 8, 8), target=Target(0.5), total_steps=10)
    assert [group.name for group in pruner.groups] == ["1"]


@pytest.mark.parametrize(
    ("name", "left", "reason"),
    [
        ("keys and queries", {"embed", "value"}, "no layer reads it that has factors, only a product of activations"),
        ("lstm", {"after"}, "layer 'memory', which reads it, has no factors"),
    ],
)
def test_what_curvature_cannot_judge_is_refused(name, left, reason):
    model, x, _ = made(name)
    pruner = Pruner(model, None, Curvature(model), x[0][:2], target=Target(0.8), total_steps=10)
    assert set(pruner.widths()) == left
    assert any(why.startswith(reason) for why in pruner.refused.values())


@pytest.mark.parametrize("criterion", ["kron_obd", "kron_obs", "c_obd", "c_obs", "gate_fisher"])
def test_frozen_layers_are_not_judged_by_curvature(criterion):
    model, x, _ = made("frozen")
    pruner = Pruner(model, None, Curvature(model), x, target=Target(0.8), total_steps=10, criterion=criterion)
    assert set(pruner.widths()) == {"third"}
    assert "'second', which makes it, gets no gradient" in pruner.refused["second"]
    assert set(
        Pruner(model, None, Curvature(model), x, target=Target(0.8), total_steps=10, criterion="l1").widths()
    ) == {
        "first",
        "second",
        "third",
    }


def test_taylor_names_frozen_parameters():
    model, x, _ = made("frozen")
    options = {"target": Target(0.8), "total_steps": 10, "criterion": "taylor"}
    with pytest.raises(ValueError, match=r"criterion taylor: first\.weight of layer 'first' is frozen"):
        Pruner(model, None, Curvature(model), x, **options)
    assert set(Pruner(model, None, Curvature(model), x, exclude=["first", "second"], **options).widths()) == {"third"}


@pytest.mark.thorough
def test_games_play_any_coalition_of_slices_of_a_group_norm():
    model, x, y = made("sequence norms")
    curvature, optimizer = Curvature(model), sgd(model, 0.02)
    options = {"target": Target(0.6), "total_steps": STEPS, "criterion": "banzhaf"}
    pruner = Pruner(model, optimizer, curvature, x[0][:2], **options)
    for _ in range(STEPS // 2):
        optimizer.zero_grad()
        F.cross_entropy(model(*x), y).backward()
        optimizer.step()
        pruner.step()
    assert pruner.params < pruner.params_start
