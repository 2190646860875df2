from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import kfac_ext
from flatprune.coupling import CONSUMER, PRODUCER, Coupling, find_coupling
from flatprune.criteria import ScoringContext, saliency
from flatprune.cutting import surgery
from flatprune.pruning.costs import ParameterCount
from tests.pruning.pruning_networks import NETWORKS, Run, context_of, digits, mlp


def trained(name: str, steps: int = 120) -> Run:
    torch.manual_seed(0)
    run = Run(NETWORKS[name]())
    run.train(steps)
    return run


@pytest.fixture(autouse=True)
def all_recent_calls(monkeypatch):
    """As the oracles here take all of them."""
    monkeypatch.setattr(saliency, "_SAMPLES", 1_000_000)


def scores_of(context: ScoringContext, criterion: str) -> list[Tensor]:
    statistics = context.statistics(CONSUMER)
    inverses = context.inverses(CONSUMER) if criterion == "obs" else None
    return saliency.curvature_scores(context.curvature, context.layers, context.groups, criterion, statistics, inverses)


def dense_blocks(run: Run, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """V, A and G of a layer without groups, in float64."""
    A = saliency.input_statistics(run.curvature, [name]).covariances[name]
    return tuple(t.double() for t in (run.curvature.folded_weight(name), A, run.curvature.factors[f"{name}.G"]))


@pytest.mark.parametrize("criterion", ["obd", "obs"])
@pytest.mark.parametrize(
    ("name", "position", "layer", "columns"),
    [
        ("mlp", 0, "3", lambda j: [j]),
        ("chain", 0, "3", lambda j: range(9 * j, 9 * j + 9)),
        ("chain", 1, "8", lambda j: range(16 * j, 16 * j + 16)),
        ("concat", 1, "join", lambda j: range(9 * (6 + j), 9 * (7 + j))),
    ],
)
@pytest.mark.filterwarnings("ignore:Curvature")
def test_scores_are_the_formula(criterion, name, position, layer, columns):
    run = trained(name, 12)
    scores = scores_of(context_of(run), criterion)
    V, A, G = dense_blocks(run, layer)
    patch = A.shape[0] - 1
    damping = torch.full((patch + 1,), 0.01 * float(A.diagonal()[:patch].mean()), dtype=torch.float64)
    damping[-1] = 1e-6
    H = torch.linalg.inv(A + torch.diag(damping))
    for j, score in enumerate(scores[position].tolist()):
        J = list(columns(j))
        middle = torch.linalg.inv(H[J][:, J]) if criterion == "obs" else A[J][:, J]
        assert score == pytest.approx(0.5 * float((V[:, J].T @ G @ V[:, J] @ middle).trace()), rel=2e-3, abs=1e-12)


def test_scores_of_consumers_and_of_their_groups_add_up():
    run = trained("resnet", 12)
    context = context_of(run)
    total = scores_of(context, "obd")[0]
    expected = torch.zeros(8, dtype=torch.float64)
    for member in context.groups[0].of_role(CONSUMER):
        V, A, G = dense_blocks(run, member.module)
        area = context.tensor(member)[0, 0].numel()
        for j in range(8):
            J = slice(j * area, (j + 1) * area)
            expected[j] += 0.5 * (V[:, J].T @ G @ V[:, J] @ A[J, J]).trace()
    torch.testing.assert_close(total, expected, rtol=1e-3, atol=1e-9)

    run = trained("grouped", 12)
    context = context_of(run)
    total, statistics = scores_of(context, "obd")[0], context.statistics(CONSUMER)
    A, G = statistics.covariances["grouped"].double(), run.curvature.factors["grouped.G"].double()
    V = run.curvature.folded_weight("grouped").double().view(3, 6, -1)
    for j in range(12):
        p, J = j // 4, slice(9 * (j % 4), 9 * (j % 4) + 9)
        value = 0.5 * (V[p, :, J].T @ G[p] @ V[p, :, J] @ A[p, J, J]).trace()
        assert float(total[j]) == pytest.approx(float(value), rel=1e-3)


def _quadratic_change(run: Run, group, neuron: int) -> float:
    """1/2 E[dz^T G dz] summed over the layers, dz what z changes by when the whole coupled neuron is masked.

    Measured by calling each layer on what it reads with the neuron's channels zero: no A, no columns, no formula.
    """
    curvature, total = run.curvature, 0.0
    inputs: dict[str, list[Tensor]] = {}
    readers = group.of_role(CONSUMER)
    handles = [
        run.model.get_submodule(m.module).register_forward_pre_hook(
            lambda _m, args, name=m.module: inputs.setdefault(name, []).append(args[0].clone())
        )
        for m in readers
    ]
    with curvature.paused(), torch.no_grad():  # what the covariances are measured on: batch statistics, recent inputs
        for call in curvature.recent_calls:
            copy.deepcopy(run.model).train()(*call.args)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        for member in readers:
            layer, x = curvature.layers[member.module], torch.cat(inputs[member.module])
            axis = 1 if layer.is_convolution else x.dim() - 1
            masked = x.index_fill(axis, member.index[neuron], 0.0)
            dz = (layer.module(masked) - layer.module(x)).movedim(axis, -1)
            if layer.norm is not None:
                dz = dz * layer.norm.weight / (layer.norm.running_var + layer.norm.eps).sqrt()
            rows = dz.reshape(-1, dz.shape[-1]).double()
            total += 0.5 * float(((rows @ curvature.factors[f"{member.module}.G"].double()) * rows).sum(1).mean())
    return total


@pytest.mark.filterwarnings("ignore:Pruner")
@pytest.mark.parametrize(("name", "position"), [("resnet", 0), ("chain", 1), ("concat", 1), ("transposed", 0)])
def test_a_coupled_neuron_is_judged_by_all_that_reads_it(name, position):
    """Residual streams, flattened positions, concatenations: the score is the quadratic model of masking it whole."""
    run = trained(name, 30)
    context = context_of(run)
    groups, scores = context.groups, scores_of(context, "obd")[position]
    assert name != "resnet" or len(groups[position].of_role(CONSUMER)) > 1
    for neuron in range(groups[position].width):
        assert float(scores[neuron]) == pytest.approx(_quadratic_change(run, groups[position], neuron), rel=1e-3)


@pytest.mark.parametrize("criterion", ["obd", "obs"])
@pytest.mark.parametrize("head_dim", [4, 80])
def test_heads_are_scored_by_all_their_columns_together(criterion, head_dim):
    """Blocks beyond the 64 columns of the kernels too."""
    torch.manual_seed(0)
    model = NETWORKS["attention"]()
    model.attn = model.Heads(12, 3, head_dim)
    run = Run(model)
    run.train(12)
    context = context_of(run)
    (heads,) = (group for group in context.groups if group.name == "attn.qkv")
    scores = dict(zip((group.name for group in context.groups), scores_of(context, criterion)))["attn.qkv"]
    assert len(scores) == heads.width == 3
    V, A, G = (
        t.double()
        for t in (
            run.curvature.folded_weight("attn.proj"),
            *(run.curvature.factors[f"attn.proj.{side}"] for side in "AG"),
        )
    )
    H = torch.linalg.inv(A + torch.diag(saliency._damping(A, True)))
    for head, score in enumerate(scores.tolist()):
        J = slice(head * head_dim, (head + 1) * head_dim)
        middle = torch.linalg.inv(H[J, J]) if criterion == "obs" else A[J, J]
        assert score == pytest.approx(0.5 * float((V[:, J].T @ G @ V[:, J] @ middle).trace()), rel=5e-3)


def layer_outputs(model: nn.Module, names: list[str], x: Tensor) -> dict[str, Tensor]:
    """Outputs of the layers named on x in evaluation mode."""
    found: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_hook(lambda _m, _a, out, name=name: found.__setitem__(name, out.clone()))
        for name in names
    ]
    model.eval()
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


def compensated(context: ScoringContext, pruned: dict[int, Tensor]) -> dict[str, Tensor]:
    inverses = context.inverses(CONSUMER)
    return saliency.compensation(context.curvature, context.layers, context.groups, pruned, inverses)


def after_removal(run: Run, coupling: Coupling, pruned: dict[int, Tensor], compensate: bool) -> nn.Module:
    """A copy of the run's model without these neurons."""
    values = compensated(ScoringContext(run.model, coupling.groups, run.curvature), pruned) if compensate else None
    model, coupling = copy.deepcopy((run.model, coupling))
    surgery.plan(model, coupling, pruned, replacements=values).commit()
    return model


@pytest.mark.filterwarnings("ignore:Curvature")
@pytest.mark.parametrize("name", NETWORKS)
def test_compensation_brings_the_layers_after_nearer(name):
    run = trained(name, 60)
    x = digits()[0][-600:]
    coupling = find_coupling(run.model, x[:2])
    groups = coupling.groups
    layers = run.curvature.layers
    run.curvature.remove()
    for position, group in enumerate(groups):
        rank = torch.arange(group.width) // group.groups if group.groups > 1 else torch.arange(group.width)
        pruned = (rank % 3 == 0).nonzero().flatten()
        if group.groups > 1:
            pruned = torch.cat([(group.group_of == p).nonzero()[:1, 0] for p in range(group.groups)])
        # a layer that loses rows as well (a recurrent one) has other outputs; compare the rest
        lost_rows = {m.module for m in group.of_role(PRODUCER)}
        names = [m.module for m in group.of_role(CONSUMER) if m.module not in lost_rows]
        seen = {name: (layers[name].norm_name or name) for name in names}
        expected = layer_outputs(run.model, list(seen.values()), x)
        on, off = (
            layer_outputs(after_removal(run, coupling, {position: pruned}, flag), list(seen.values()), x)
            for flag in (True, False)
        )
        # later ones also see changed inputs; layer norms on a stream take their statistics over the survivors, which no
        # linear update foresees: there the last one tells
        first = seen[names[-1 if group.name == "embed" else 0]]
        error_on, error_off = (float((z[first] - expected[first]).square().mean()) for z in (on, off))
        assert error_on < 0.9 * error_off, (group.name, first)


def test_constant_part_goes_to_the_bias_or_the_running_mean():
    run = trained("chain", 30)
    values = compensated(context_of(run), {0: torch.tensor([1]), 1: torch.tensor([2]), 2: torch.tensor([3])})
    assert set(values) == {"3.weight", "3.bias", "8.weight", "8.bias", "10.weight", "10.bias"}
    run = trained("depthwise", 30)
    values = compensated(context_of(run), {0: torch.tensor([1])})
    assert set(values) == {"project.weight", "norm2.running_mean"}
    assert not torch.equal(values["norm2.running_mean"], run.model.norm2.running_mean)


def test_compensation_is_the_least_squares_update():
    """With the raw A (damping aside) the survivors' update minimises the mean squared change of W a."""
    run = trained("mlp", 40)
    context, pruned = context_of(run), torch.tensor([0, 3, 10])
    values = compensated(context, {0: pruned})
    A = context.statistics(CONSUMER).covariances["3"].double()
    A = A + torch.diag(saliency._damping(A, True))
    W = torch.cat([run.model[3].weight, run.model[3].bias[:, None]], dim=1).detach().double()
    keep = [j for j in range(A.shape[0]) if j not in pruned.tolist()]
    expected = W[:, keep] + W[:, pruned] @ torch.linalg.solve(A[keep][:, keep], A[keep][:, pruned]).T
    torch.testing.assert_close(values["3.weight"][:, keep[:-1]].double(), expected[:, :-1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(values["3.bias"].double(), expected[:, -1], rtol=1e-3, atol=1e-4)
    assert torch.equal(values["3.weight"][:, pruned], run.model[3].weight[:, pruned])


@pytest.mark.filterwarnings("ignore:Curvature")
@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_that_go_with_a_neuron_are_exact(name):
    source = NETWORKS[name]()
    total = sum(p.numel() for p in source.parameters())
    found = find_coupling(source, digits()[0][:2])
    costs = ParameterCount(source, found.groups).neuron_costs()
    for position, cost in enumerate(costs):
        model, coupling = copy.deepcopy((source, found))
        group = coupling.groups[position]
        pruned = torch.cat([(group.group_of == p).nonzero()[:1, 0] for p in range(group.groups)])
        surgery.plan(model, coupling, {position: pruned}).commit()
        assert total - sum(p.numel() for p in model.parameters()) == pytest.approx(cost * len(pruned))


def test_scoring_before_training_is_refused():
    run = Run(mlp())
    run.curvature.trace(digits()[0][:2])
    with pytest.raises(RuntimeError, match="no factors yet"):
        saliency.input_statistics(run.curvature, ["3"])


def test_bad_factors_are_named():
    run = trained("mlp", 5)
    run.curvature.factors["3.A"].fill_(torch.nan)
    with pytest.raises(ValueError, match="3: the covariance"):
        saliency.input_statistics(run.curvature, ["3"]).inverses()
    with pytest.raises(ValueError, match="1: the scores"):
        scores_of(context_of(run), "obd")


def test_what_fails_in_float32_is_inverted_in_float64(monkeypatch):
    """As on a GPU, where `damped_inverse_ex` does not try again."""
    rows = torch.randn(50, 6)
    covariances = {"a": rows.mT @ rows, "b": rows[:, :4].mT @ rows[:, :4]}
    statistics = saliency.InputStatistics(covariances, {"a": False, "b": False})
    wanted = statistics.inverses()
    attempt = kfac_ext.damped_inverse_ex

    def fails(matrices, damping):
        inverses, info = attempt(matrices, damping)
        inverses[1].fill_(torch.nan)
        info[1] = 3
        return inverses, info

    monkeypatch.setattr(kfac_ext, "damped_inverse_ex", fails)
    assert torch.equal(statistics.inverses()["b"][0], wanted["b"][0])
    covariances["b"][1, 1] = torch.nan
    with pytest.raises(ValueError, match=r"^b: the covariance of its inputs is not positive definite or not finite"):
        statistics.inverses()
