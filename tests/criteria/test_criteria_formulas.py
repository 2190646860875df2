"""Each criterion against its formula, written out densely in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatprune.coupling import CONSUMER, PRODUCER, Coupling
from flatprune.criteria import CRITERIA, ScoringContext, banzhaf, shapley
from flatprune.criteria.game import MaskedNetwork
from kfac_ext.curvature.draws import Draws
from kfac_ext.curvature.losses import loss_of
from tests.pruning.pruning_networks import Run, context_of, digits, masked, mlp

pytestmark = pytest.mark.filterwarnings("ignore:Curvature")


def damped(M: Tensor, constant: bool) -> Tensor:
    diagonal = M.diagonal()[: len(M) - constant]
    D = torch.full((len(M),), 0.01 * float(diagonal.mean()) + 1e-12, dtype=M.dtype)
    if constant:
        D[-1] = 1e-6
    return M + torch.diag(D)


class Part:
    """One member of a neuron: V, A, G of its slice of a layer, and the rows or columns of neuron j."""

    def __init__(self, context: ScoringContext, member, role: str, j: int) -> None:
        name, index = member.module, member.index[j]
        weight = context.model.get_submodule(name).weight
        groups = getattr(context.model.get_submodule(name), "groups", 1)
        size = weight.shape[1] if role == CONSUMER else weight.shape[0] // groups
        group, channels = int(index[0]) // size, index % size
        area = weight[0, 0].numel()
        columns = [int(c) * area + k for c in channels for k in range(area)]
        self.entries = columns if role == CONSUMER else channels.tolist()
        self.constant = context.curvature.layers[name].constant
        A, G = context.statistics(role).covariances[name], context.curvature.factors[f"{name}.G"]
        V = context.curvature.folded_weight(name)
        self.A, self.G = (A[group], G[group]) if groups > 1 else (A, G)
        self.V = V.unflatten(0, (groups, -1))[group]


def constrained_minimum(F_: Tensor, theta: Tensor, fixed: Tensor) -> tuple[float, Tensor]:
    """min of 1/2 d^T F d with theta + d = 0 where `fixed`, by the dense system of the free entries, and theta + d."""
    d = torch.where(fixed, -theta, torch.zeros_like(theta))
    free = ~fixed
    d[free] = torch.linalg.lstsq(F_[free][:, free], -F_[free][:, fixed] @ d[fixed], driver="gelsd").solution
    return 0.5 * float(d @ F_ @ d), theta + d


def dense_value(criterion: str, part: Part) -> float:
    """The criterion's value of one part, from the Fisher block A (x) G of all its weights."""
    by_rows = criterion not in ("obs", "obd")
    A = damped(part.A, part.constant) if criterion in ("obs", "c_obs") else part.A
    G = damped(part.G, False) if criterion in ("kron_obs", "c_obs") else part.G
    fisher = torch.kron(G, A)  # of vec(V), row after row
    fixed = torch.zeros_like(part.V, dtype=torch.bool)
    fixed[part.entries if by_rows else slice(None), slice(None) if by_rows else part.entries] = True
    fixed, theta = fixed.flatten(), part.V.flatten()
    alone = torch.where(fixed, theta, torch.zeros_like(theta))
    if criterion in ("obd", "kron_obd"):
        return 0.5 * float(alone @ fisher @ alone)
    if criterion == "c_obd":
        return 0.5 * float(fisher.diagonal() @ alone.square())
    if criterion == "c_obs":
        return 0.5 * float((alone.square() / torch.linalg.inv(fisher).diagonal()).sum())
    return constrained_minimum(fisher, theta, fixed)[0]


CASES = [("mlp", 1), ("concat", 1), ("concat", 3), ("grouped", 1), ("resnet", 0)]


@pytest.mark.parametrize("criterion", ["obs", "obd", "kron_obd", "kron_obs", "c_obd", "c_obs"])
@pytest.mark.parametrize(("name", "position"), CASES)
def test_quadratic_criteria_are_the_dense_fisher_form(double_nets, criterion, name, position):
    """Zeroed weights, the minimum under the constraint, or single weights: summed over all layers of the neuron."""
    context = context_of(double_nets[name])
    role, group = CRITERIA[criterion].role, context.groups[position]
    scores = CRITERIA[criterion].scores(context)[position]
    for j in (0, group.width - 1):
        parts = [Part(context, member, role, j) for member in group.of_role(role)]
        assert float(scores[j]) == pytest.approx(sum(dense_value(criterion, part) for part in parts), rel=1e-6)


def test_rows_that_stay_reach_the_joint_minimum(double_nets):
    """All rows that go at once: the block solve, not the sum of single updates; batch norm folded back."""
    for name, position, layer in (("mlp", 1, "3"), ("chain", 0, "0")):
        context = context_of(double_nets[name])
        pruned = torch.tensor([0, 2, 5])
        values = CRITERIA["kron_obs"].compensation(context, {position: pruned})
        member = context.groups[position].of_role(PRODUCER)[0]
        part = Part(context, member, PRODUCER, 0)
        fixed = torch.zeros_like(part.V, dtype=torch.bool)
        fixed[pruned] = True
        G = damped(part.G, False)
        kept = [i for i in range(len(part.V)) if i not in pruned.tolist()]
        expected = part.V[kept] + torch.linalg.solve(G[kept][:, kept], G[kept][:, pruned]) @ part.V[pruned]
        model = context.model
        state = {key: value.clone() for key, value in model.state_dict().items()}
        try:
            model.load_state_dict({**state, **values})
            found = context.curvature.folded_weight(layer)
        finally:
            model.load_state_dict(state)
        torch.testing.assert_close(found[kept], expected, rtol=1e-6, atol=1e-8)
        least, _ = constrained_minimum(torch.kron(G, part.A), part.V.flatten(), fixed.flatten())
        change = torch.where(fixed, -part.V, torch.zeros_like(part.V))
        change[kept] = expected - part.V[kept]
        assert 0.5 * float((change @ part.A * (G @ change)).sum()) == pytest.approx(least, rel=1e-6)


def test_row_compensation_holds_with_batch_statistics_too(double_nets):
    """gamma, mean and variance follow the new weights, so that training mode sees the folded rows as well."""
    context = context_of(double_nets["chain"])
    values = CRITERIA["kron_obs"].compensation(context, {0: torch.tensor([0, 2, 5])})
    model, x = context.model, torch.cat([call.args[0] for call in context.curvature.recent_calls])
    convolution, norm = model[0], model[1]
    raw = F.conv2d(x, values["0.weight"], padding=1)
    before = F.conv2d(x, convolution.weight.detach(), padding=1)
    change = raw.var((0, 2, 3), unbiased=False) - before.var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(values["1.running_var"] - norm.running_var, change, rtol=1e-6, atol=1e-9)
    mean = raw.mean((0, 2, 3)) - before.mean((0, 2, 3))
    torch.testing.assert_close(values["1.running_mean"] - norm.running_mean, mean, rtol=1e-6, atol=1e-9)
    scale = values["1.weight"] / (values["1.running_var"] + norm.eps).sqrt()
    torch.testing.assert_close(scale, norm.weight.detach() / (norm.running_var + norm.eps).sqrt())


def test_magnitudes(double_nets):
    context = context_of(double_nets["mlp"])
    weight = context.model[1].weight.detach()
    found = {name: CRITERIA[name].scores(context)[0] for name in ("l1", "l2", "l1_uniform", "l2_uniform", "fpgm")}
    torch.testing.assert_close(found["l1"], weight.abs().mean(dim=1))
    torch.testing.assert_close(found["l2"], weight.norm(dim=1) / weight.shape[1] ** 0.5)
    distances = torch.stack([(weight - row).norm(dim=1).sum() for row in weight])
    for name, values in (("l1_uniform", found["l1"]), ("l2_uniform", found["l2"]), ("fpgm", distances)):
        assert found[name].argsort().tolist() == values.argsort().tolist()
        assert sorted((found[name] * 24).round().tolist()) == list(range(1, 25))


def test_norm_scales_are_averaged_over_the_norms_of_a_neuron(double_nets):
    context = context_of(double_nets["resnet"])
    norms = [
        context.tensor(m).detach().abs()
        for m in context.groups[0].of_role("channelwise")
        if isinstance(context.model.get_submodule(m.module), nn.BatchNorm2d) and m.name.endswith("weight")
    ]
    assert len(norms) > 1
    torch.testing.assert_close(CRITERIA["bn_scale"].scores(context)[0], torch.stack(norms).mean(dim=0))


@pytest.mark.parametrize(("name", "position", "place"), [("mlp", 0, 1), ("chain", 0, 1)])
def test_taylor_is_the_squared_derivative_of_a_gate(double_nets, name, position, place):
    """A gate on z (the output of the layer, or of its batch norm), on the batch that left the gradients."""
    context = context_of(double_nets[name])
    x, y = (t[:32] for t in digits())
    gate = torch.ones(context.groups[position].width, dtype=torch.float64, requires_grad=True)
    shape = (1, -1, 1, 1) if name == "chain" else (1, -1)
    model, parameters = context.model, list(context.model.parameters())
    handle = model[place].register_forward_hook(lambda _m, _a, out: out * gate.view(shape))
    try:
        with context.probing():
            loss = F.cross_entropy(model(x.double()), y)
        slope, *gradients = torch.autograd.grad(loss, [gate, *parameters])
    finally:
        handle.remove()
    kept = [parameter.grad for parameter in parameters]
    try:
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient
        found = CRITERIA["taylor"].scores(context)[position]
    finally:
        for parameter, gradient in zip(parameters, kept):
            parameter.grad = gradient
    torch.testing.assert_close(found, slope.square(), rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize(("name", "position", "place"), [("mlp", 0, 1), ("chain", 0, 1)])
def test_gate_fisher_is_the_mean_square_of_gate_derivatives(double_nets, name, position, place):
    """A gate of its own for every sample: its derivative, squared, averaged; labels as the criterion draws them."""
    context = context_of(double_nets[name])
    generator, slopes = context_of(double_nets[name]).generator, []
    for call in context.curvature.recent_calls:
        gate = torch.ones(call.samples, context.groups[position].width, dtype=torch.float64, requires_grad=True)
        shape = (*gate.shape, 1, 1) if name == "chain" else gate.shape
        handle = context.model[place].register_forward_hook(lambda _m, _a, out, g=gate, s=shape: out * g.view(s))
        try:
            with context.probing():
                logits = context.model(*call.args)
        finally:
            handle.remove()
        labels = loss_of("cross_entropy").draw(logits, Draws(generator))
        slopes += torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), gate)
    found = CRITERIA["gate_fisher"].scores(context)[position]
    torch.testing.assert_close(found, 0.5 * torch.cat(slopes).square().mean(dim=0), rtol=1e-6, atol=1e-14)


def tiny_game() -> tuple[ScoringContext, dict[frozenset, float]]:
    """Five neurons, and D of every set of pruned neurons, by hooks that silence what is read."""
    run = Run(mlp(3, 2))
    run.train(30)
    context = context_of(run)
    x = torch.cat([call.args[0] for call in context.curvature.recent_calls])
    owners = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    values = {}
    with torch.no_grad(), context.curvature.paused():
        whole = run.model(x).log_softmax(1)
        for mask in itertools.product((False, True), repeat=5):
            pruned = [owner for owner, out in zip(owners, mask) if out]
            lost = {p: torch.tensor([j for q, j in pruned if q == p]) for p in {q for q, _ in pruned}}
            with masked(run.model, Coupling(context.groups), lost):
                without = run.model(x).log_softmax(1)
            key = frozenset(i for i, out in enumerate(mask) if out)
            values[key] = float((whole.exp() * (whole - without)).sum(1).mean())
    return context, values


def test_games_are_the_averages_over_all_coalitions():
    context, values = tiny_game()
    network = MaskedNetwork(context)
    for pruned in (set(), {1}, {0, 3}, {0, 1, 2, 3, 4}):
        mask = torch.tensor([i in pruned for i in range(5)])
        assert network.divergence_without(mask) == pytest.approx(values[frozenset(pruned)], rel=1e-4, abs=1e-6)

    orders = list(itertools.permutations(range(5)))
    exact = torch.zeros(5, dtype=torch.float64)
    for order in orders:
        for place, player in enumerate(order):
            before = frozenset(order[:place])
            exact[player] += (values[before | {player}] - values[before]) / len(orders)
    found = torch.cat(shapley(5 * 200).scores(context))
    everything = values[frozenset(range(5))]
    assert float(found.sum()) == pytest.approx(everything, rel=1e-4)  # holds for any number of orders
    torch.testing.assert_close(found, exact, rtol=0, atol=0.05 * everything)

    keep, weighted = 0.8, torch.zeros(5, dtype=torch.float64)
    for player in range(5):
        for pruned in (key for key in values if player not in key):
            chance = (1 - keep) ** len(pruned) * keep ** (4 - len(pruned))
            weighted[player] += chance * (values[pruned | {player}] - values[pruned])
    found = torch.cat(banzhaf(1000, keep).scores(context))
    torch.testing.assert_close(found, weighted, rtol=0, atol=0.05 * everything)
