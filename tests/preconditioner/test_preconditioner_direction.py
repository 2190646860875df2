"""The direction against dense oracles in float64: explicit Kronecker products, the natural gradient, a peer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kfac_ext import KFACPreconditioner
from tests.curvature import curvature_nets, curvature_oracles
from tests.layers import foreign_layers
from tests.preconditioner.preconditioner_helpers import DAMPING, backward, classes, generator, preconditioned


def as_matrix(module, weight):
    """[O, d] in the order of the patches; entry by entry for transposed convolutions, [in, out/groups, kernel]."""
    if not isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return weight.flatten(1)
    inputs, outputs = module.in_channels // module.groups, module.out_channels // module.groups
    rows = []
    for o in range(module.out_channels):
        share = o // outputs * inputs
        rows.append(torch.cat([weight[share + c, o % outputs].flatten().flip(0) for c in range(inputs)]))
    return torch.stack(rows)


def dense_direction(A, G, matrix, bias):
    """V by one solve with the explicit Kronecker product of every group, column-major vec of [W, b]."""
    matrix = matrix if bias is None else torch.cat([matrix, bias[:, None]], dim=1)
    blocks = []
    for block, a, g in zip(matrix.view(len(A), -1, matrix.shape[1]), A, G):
        pi = (a.diagonal().mean() / g.diagonal().mean()).sqrt()
        a = a + pi * DAMPING**0.5 * torch.eye(len(a), dtype=a.dtype)
        g = g + DAMPING**0.5 / pi * torch.eye(len(g), dtype=g.dtype)
        vec = torch.linalg.solve(torch.kron(a, g), block.T.flatten())  # A (x) G on the vec that stacks columns
        blocks.append(vec.view(len(a), len(g)).T)
    return torch.cat(blocks)


NETS = {
    "mlp": "0 2 4",
    "sequence": "inner head",
    "called_twice": "shared head",
    "conv_called_twice": "shared head",
    "mlp_norm": "0 3",
    "residual": "first second head",
    "conv_norm_depthwise": "0 4 9",
    "conv_stride_dilation": "0 2 6",
    "conv_same": "0 2 6",
    "conv_grouped": "0 2 6",
    "conv_circular": "0 2 6",
    "sequence_conv": "0 3 7",
    "sequence_conv_grouped": "0 3 7",
    "sequence_conv_circular": "0 3 7",
    "transposed": "0 2 5",
    "transposed_cropped": "0 2 5",
    "transposed_grouped": "0 2 5",
    "transposed_sequence": "0 2 5",
    "volumes_called_twice": "shared head",
    "volumes": "0 2 7",
    "volumes_grouped": "0 2 7",
    "volumes_reflect": "0 2 7",
    "transposed_volumes": "0 2 5",
    "transposed_volumes_grouped": "0 2 5",
}  # fmt: skip


@pytest.mark.parametrize("mode", ["expand", "reduce"])
@pytest.mark.parametrize("name", NETS)
def test_direction_is_that_of_the_dense_blocks(name, mode):
    # factors of every layer's own output (also where a norm follows), outer product by outer product; empirical Fisher
    model, x = curvature_nets.make(name)
    y = classes(x, *copy.deepcopy(model)(x).shape[2:])
    modules = {layer: (model.get_submodule(layer),) * 2 for layer in NETS[name].split()}
    inputs, grads = curvature_oracles.observe(
        copy_of := copy.deepcopy(model),
        {layer: (copy_of.get_submodule(layer),) * 2 for layer in modules},
        x,
        curvature_oracles.cross_entropy_sum(y),
    )
    before, after = preconditioned(model, x, y, fisher_type="empirical", kfac_approx=mode)
    touched = set()
    for layer, (module, _) in modules.items():
        bias = before.get(f"{layer}.bias")
        A, G = curvature_oracles.factors(module, inputs[layer], grads[layer], mode, bias is not None, y.numel())
        V = dense_direction(A, G, as_matrix(module, before[f"{layer}.weight"]), bias)
        found = as_matrix(module, after[f"{layer}.weight"])
        d = found.shape[1]
        torch.testing.assert_close(found, V[:, :d], rtol=1e-8, atol=1e-10)
        if bias is not None:
            torch.testing.assert_close(after[f"{layer}.bias"], V[:, d], rtol=1e-8, atol=1e-10)
        touched |= {f"{layer}.weight", f"{layer}.bias"}
    assert all(torch.equal(before[key], after[key]) for key in before if key not in touched)  # norms


@pytest.mark.parametrize("mode", ["expand", "reduce"])
@pytest.mark.parametrize("name", sorted(set(foreign_layers.CASES) - {"multiplied", "turned"}))  # biases added later
def test_foreign_layers_get_the_direction_of_plain_ones(name, mode):
    model, plain, x, places = foreign_layers.make(name)
    y = classes(x)
    before, found = preconditioned(model, x, y, fisher_type="empirical", kfac_approx=mode)
    _, expected = preconditioned(plain, x, y, fisher_type="empirical", kfac_approx=mode)
    for layer, (place, _z) in places.items():
        key = layer if layer in found else f"{layer}.weight"
        value = expected[f"{place}.weight"]
        assert not torch.equal(before[key], found[key])
        torch.testing.assert_close(found[key], value if value.shape == found[key].shape else value.T)


def test_one_input_and_many_labels_give_the_natural_gradient():
    # at a single input a, A (x) G is the Fisher matrix itself once G is: the direction is (F + damping)^-1 gradient
    # up to the split of the damping, which vanishes with it on the range of F
    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    a, count = torch.randn(3, dtype=torch.float64), 4000
    x, y = a.expand(count, 3), torch.randint(0, 4, (count,))
    with KFACPreconditioner(model, damping=1e-10, generator=generator()) as preconditioner:
        backward(model, x, y)
        gradient = torch.cat([model.weight.grad, model.bias.grad[:, None]], dim=1)
        preconditioner.step()
    direction = torch.cat([model.weight.grad, model.bias.grad[:, None]], dim=1)
    p, one = model(a).softmax(0).detach(), torch.cat([a, a.new_ones(1)])
    fisher = torch.kron(torch.diag(p) - torch.outer(p, p), torch.outer(one, one))  # of mean loss, rows of [W, b]
    natural = (torch.linalg.pinv(fisher, hermitian=True) @ gradient.flatten()).view_as(gradient)
    # compare the change of the logits, which the null space of F does not touch (p is drawn: 4,000 labels, 2 %)
    found, exact = direction @ one, natural @ one
    found, exact = found - found.mean(), exact - exact.mean()
    assert (found - exact).norm() < 0.1 * exact.norm()


def test_the_true_fisher_uses_no_labels_and_no_random_stream():
    model, x = curvature_nets.make("mlp")
    twin = copy.deepcopy(model)
    state = torch.get_rng_state()
    _, first = preconditioned(model, x, classes(x), generator=generator())
    assert torch.equal(torch.get_rng_state(), state)
    _, again = preconditioned(twin, x, classes(x), generator=generator())
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_direction_agrees_with_curvlinops():
    # the other library's own factors, damping and inverse, on a network without spatial positions
    curvlinops = pytest.importorskip("curvlinops")
    model, x = curvature_nets.make("mlp")
    model[1] = nn.Tanh()  # an activation in place breaks it
    y = classes(x)
    operator = curvlinops.KFACLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)], fisher_type="empirical",
        separate_weight_and_bias=False, check_deterministic=False,
    )  # fmt: skip
    before, after = preconditioned(model, x, y, fisher_type="empirical")
    inverse = curvlinops.KFACInverseLinearOperator(operator, damping=DAMPING, use_heuristic_damping=True)
    found = inverse @ [before[name] for name, _ in model.named_parameters()]
    for value, (name, _) in zip(found, model.named_parameters(), strict=True):
        torch.testing.assert_close(after[name], value)
