"""Criteria from first derivatives: how the loss answers to a gate on the neuron.

With a gate c on z_j (after the batch norm), dL/dc at c = 1 is the sum over samples and positions of g z. That is also
the sum of g w over the parameters of the last affine map that makes z_j: gamma and beta of a batch norm, else weights
and bias. (Over the weights in front of a batch norm the sum is zero, whatever the neuron does.) Layers that produce the
neuron together share one gate, so their sums are added before the square.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flatprune.coupling import CHANNELWISE, PRODUCER, Member, NeuronGroup
from flatprune.coupling.neurons import tensor_name
from flatprune.criteria.base import Criterion, Scores, ScoringContext
from flatprune.criteria.members import member_rows
from kfac_ext.curvature.calls import call_hooks
from kfac_ext.curvature.capture import Capture
from kfac_ext.curvature.recent import Call
from kfac_ext.layers import Layer


@torch.no_grad()
def taylor_scores(context: ScoringContext) -> Scores:
    """S_j = (sum of g w)^2 over the parameters of the last affine map that makes z_j.

    g is what the last backward of the training loop left in `.grad`: one mini-batch with its true labels, and whatever
    else the objective had.
    """
    return [_first_order(context, group).square() for group in context.groups]


def _first_order(context: ScoringContext, group: NeuronGroup) -> Tensor:
    total = torch.zeros(group.width, dtype=torch.float64)
    for member in group.of_role(PRODUCER):
        for name, parameter in _affine_map(context, group, member):
            rows = (parameter * context.gradient(parameter, name)).double()
            rows = rows if rows.dim() == 1 else member_rows(rows, member).sum(dim=1)
            total += rows.cpu()[member.index].sum(dim=1)
    return total


def check_gradients(context: ScoringContext) -> None:
    """Raise ValueError, naming the layer, for neurons behind parameters that are frozen."""
    for group in context.groups:
        for member in group.of_role(PRODUCER):
            for name, parameter in _affine_map(context, group, member):
                if not parameter.requires_grad:
                    raise ValueError(
                        f"criterion taylor: {name} of layer {member.module!r} is frozen and gets no gradient; choose "
                        "another criterion, or exclude the layer"
                    )


def _affine_map(context: ScoringContext, group: NeuronGroup, member: Member) -> list[tuple[str, Tensor]]:
    """Parameters of the map to z, by name: gamma and beta of the norm behind the layer, else its weight and bias."""
    layer = context.layers.get(member.names)
    if layer is not None and layer.norm is not None and layer.norm.weight is not None:
        own = [(key, getattr(layer.norm, key)) for key in ("weight", "bias")]
        return [(tensor_name(str(layer.norm_name), key), t) for key, t in own if t is not None]
    biases = [m for m in group.of_role(CHANNELWISE) if m.module == member.module and PRODUCER not in m.roles]
    return [(m.name, context.tensor(m)) for m in (member, *biases) if context.tensor(m).dim() == 1 or m is member]


def gate_scores(context: ScoringContext) -> Scores:
    """S_j = 1/2 E[(sum over positions of g z_j)^2], the diagonal Fisher of the gates.

    One forward a recent call, labels drawn from the model's own prediction.
    """
    layers = [context.curvature.layer(name) for name in context.layer_names(PRODUCER)]
    scores, count = [torch.zeros(group.width, dtype=torch.float64) for group in context.groups], 0
    for call in context.recent_calls():
        sums, terms = _gate_gradients(context, layers, call)
        count += terms
        for total, group in zip(scores, context.groups):
            gates = [sums[context.layers[m.names].name].double().cpu()[:, m.index] for m in group.of_role(PRODUCER)]
            total += torch.stack([gate.sum(dim=2) for gate in gates]).sum(dim=0).square().sum(dim=0)
    return [0.5 * total / count for total in scores]


def _gate_gradients(context: ScoringContext, layers: list[Layer], call: Call) -> tuple[dict[str, Tensor], int]:
    """Sum over positions and calls of g z [N, O] of each layer; what the mean loss divides by."""
    curvature, capture = context.curvature, Capture()
    loss = curvature.loss
    values: dict[str, list[Tensor]] = {}

    def report(layer: Layer, x: Tensor, z: Tensor) -> None:
        values.setdefault(layer.name, []).append(z.detach().clone())  # an in-place activation may follow
        capture.add(layer, x, z)

    with context.probing(), torch.enable_grad(), call_hooks(layers, report):
        capture.read(curvature.reading, call.run(context.model), curvature.layers, call)
    curvature.place(capture, call)
    prediction = capture.prediction
    targets = loss.draw(prediction, context.draws)
    gradients = capture.gradients_of(prediction, loss.gradient(prediction.detach(), targets))
    sums = {}
    for layer in layers:
        products = [None if g is None else z * g for z, g in zip(values[layer.name], gradients[layer.name])]
        calls = [_over_positions(layer, p) for p in capture.samples_first(layer.name, products) if p is not None]
        sums[layer.name] = torch.stack(calls).sum(dim=0)
    return sums, loss.terms(prediction)


def _over_positions(layer: Layer, product: Tensor) -> Tensor:
    """[N, O] of what convolutions give as [N, O, h, w] and linear layers as [N, ..., O]."""
    dims = range(2, product.dim()) if layer.is_convolution else range(1, product.dim() - 1)
    return product.sum(dim=tuple(dims)) if len(dims) else product


_MOLCHANOV = "Molchanov et al. 2019, Importance estimation for neural network pruning, arXiv 1906.10771"
TAYLOR = Criterion(
    "taylor",
    taylor_scores,
    _MOLCHANOV,
    needs=("gradients",),
    role=PRODUCER,
    per_cost=True,
    check=check_gradients,
)
GATE_FISHER = Criterion(
    "gate_fisher",
    gate_scores,
    "Theis et al. 2018, Fisher pruning, arXiv 1801.05787",
    needs=("factors", "forwards"),
    role=PRODUCER,
    per_cost=True,
    predicts_loss=True,
)
