"""How much the loss is predicted to change when a neuron goes, and the update of the survivors that softens it.

For a layer z = V a that reads neuron j through the columns J of V (batch norm folded, a with a 1 appended), with
A = E[a a^T] and G = E[g g^T]:

- obd: S_j = 1/2 tr(V_J^T G V_J A_JJ), the second-order change of the loss when column(s) J become zero;
- obs: S_j = 1/2 tr(V_J^T G V_J (H_JJ)^-1), H = (A + D)^-1, the same after the best linear compensation by all other
  inputs of the layer: optimal brain surgeon (Hassibi & Stork 1992) with the Kronecker-factored curvature, seen from
  the columns that read a neuron.

Several consumers add up; columns that meet in one layer form one block J, with their cross terms. The criterion of
Ebrahimi & Klabjan 2021 (arXiv 2111.08577) is not reproduced; these scores are this package's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import kfac_ext
from flatprune.coupling import CONSUMER, NeuronGroup
from flatprune.coupling.neurons import tensor_name
from flatprune.criteria.members import Layers, Reading, input_columns, lost_channels, readings
from kfac_ext.curvature.curvature import inverter
from kfac_ext.curvature.probing import fresh_look
from kfac_ext.layers import Layer

if TYPE_CHECKING:
    from kfac_ext.curvature import Curvature

Invert = Callable[..., tuple[list[Tensor], Tensor]]

RELATIVE_DAMPING = 1e-2  # of the mean of diag A; 1e-3 and 0.1 lost 0.3 and 0.9 points of accuracy
CONSTANT_DAMPING = 1e-6  # of the appended 1, whose variance is known
_SAMPLES = 128  # that an event looks at, where an A needs no more rows than they give
_ENTRIES_TOGETHER = 1 << 20  # of covariances inverted in one call, where memory counts: enough to share out
_TINY = 1e-12  # keeps A + D definite where a layer's inputs are all zero


@dataclass
class InputStatistics:
    """Second moments of the inputs of layers, and H = (A + D)^-1 of them once asked for.

    Attributes:
        covariances: layer name -> A [d, d], or [groups, d, d]; the last row for the 1 where the layer has a constant.
        constant: layer name -> whether A has that last row.
        predictions: of the model for each recent call, where forwards of these gave A; else None.
        invert: as `kfac_ext.damped_inverse_ex`.
    """

    covariances: dict[str, Tensor]
    constant: dict[str, bool]
    predictions: list[Tensor] | None = None
    invert: Invert = kfac_ext.damped_inverse_ex

    def blocks(self, name: str) -> tuple[Tensor, ...]:
        """A of each group of a layer."""
        return factor_blocks(self.covariances[name])

    def inverses(self) -> dict[str, tuple[Tensor, ...]]:
        """H = (A + D)^-1 of each group of every layer, D = 0.01 mean(diag A) on the diagonal, 1e-6 for the 1.

        All layers in one call of `kfac_ext.damped_inverse_ex`; what fails in float32 is tried again in float64.

        Raises:
            ValueError: naming the layer whose A is not finite or not positive definite.
        """
        return self._inverses_of(list(self.covariances))

    def spent_inverses(self) -> dict[str, tuple[Tensor, ...]]:
        """As `inverses`; each A is given up for its H, some layers at a time, so that not all of both are held."""
        found: dict[str, tuple[Tensor, ...]] = {}
        while self.covariances:
            names, entries = [], 0
            for name, A in self.covariances.items():
                names.append(name)
                entries += A.numel()
                if entries >= _ENTRIES_TOGETHER:
                    break
            found.update(self._inverses_of(names))
            for name in names:
                del self.covariances[name]
        return found

    def _inverses_of(self, names: Sequence[str]) -> dict[str, tuple[Tensor, ...]]:
        return damped_inverses(
            {name: self.blocks(name) for name in names},
            lambda name, block: _damping(block, self.constant[name]),
            "the covariance of its inputs",
            self.invert,
        )


def damped_inverses(
    factors: Mapping[str, tuple[Tensor, ...]], damping_of: Callable[[str, Tensor], Tensor], what: str, invert: Invert
) -> dict[str, tuple[Tensor, ...]]:
    """(M + damping on the diagonal)^-1 of each group of every layer, in one call; float64 where float32 fails.

    Args:
        factors: layer name -> M of each group.
        damping_of: (layer name, M) -> [n].
        what: M in words, for the error.
        invert: as `kfac_ext.damped_inverse_ex`.

    Raises:
        ValueError: naming the layer whose M is not finite or not positive definite.
    """
    owners = [(name, block) for name, blocks in factors.items() for block in blocks]
    damping = [damping_of(name, block) for name, block in owners]
    inverses, info = invert([block for _, block in owners], damping)
    for i in info.nonzero().flatten().tolist():
        name, block = owners[i]
        try:  # on a GPU once more, in float64
            inverses[i] = kfac_ext.damped_inverse([block], [damping[i]])[0]
        except torch.linalg.LinAlgError:
            raise ValueError(f"{name}: {what} is not positive definite or not finite") from None
    found: dict[str, tuple[Tensor, ...]] = {}
    for (name, _), inverse in zip(owners, inverses):
        found[name] = (*found.get(name, ()), inverse)
    return found


def factor_blocks(tensor: Tensor) -> tuple[Tensor, ...]:
    """The factor of each group of a layer."""
    return tensor.unbind(0) if tensor.dim() == 3 else (tensor,)


def relative_damping(matrix: Tensor) -> Tensor:
    """0.01 mean(diag M) for every entry of the diagonal, [n]."""
    return (RELATIVE_DAMPING * matrix.diagonal().mean() + _TINY).expand(len(matrix)).clone()


def _damping(A: Tensor, constant: bool) -> Tensor:
    if not constant:
        return relative_damping(A)
    damping = relative_damping(A[:-1, :-1])
    return torch.cat([damping, damping.new_full((1,), CONSTANT_DAMPING)])


def input_statistics(curvature: Curvature, names: Iterable[str]) -> InputStatistics:
    """A of the inputs of the layers named.

    With a convolution in the network: *expand* A of the newest calls made again, batch norms on batch statistics
    (the *reduce* A of the running factors starves early layers); else the running A. Calls of 128 samples are made
    again, or as many of the recent ones (256 samples) as it takes for an A to have as many rows as columns.

    Raises:
        RuntimeError: the model has made no training forward yet.
    """
    names = list(names)
    if not curvature.is_updated:
        raise RuntimeError("no factors yet: the model must make a training forward before neurons can be scored")
    constant = {name: curvature.layers[name].constant for name in names}
    if curvature.has_convolutions:
        covariances, predictions = fresh_look(
            curvature, names, curvature.recent_calls, "expand", bias=None, samples=_SAMPLES
        )
        return InputStatistics(covariances, constant, predictions, inverter(curvature))
    covariances = {name: curvature.factors[f"{name}.A"] for name in names}
    return InputStatistics(covariances, constant, invert=inverter(curvature))


@torch.no_grad()
def curvature_scores(
    curvature: Curvature,
    layers: Layers,
    groups: Sequence[NeuronGroup],
    criterion: str,
    statistics: InputStatistics,
    inverses: Mapping[str, tuple[Tensor, ...]] | None = None,
) -> list[Tensor]:
    """S_j of every neuron of every group, not yet divided by its parameters.

    Args:
        curvature: gives G and the folded weights.
        layers: those with factors, by the names of their weights.
        groups: the neuron groups.
        criterion: "obs" or "obd".
        statistics: A of every consumer.
        inverses: H of every consumer (`statistics.inverses()`), needed for "obs".

    Returns:
        One float32 or float64 tensor [neurons] a group, on the CPU.

    Raises:
        ValueError: naming the group whose scores are not finite.
    """
    members = readings(layers, groups, CONSUMER)
    weights = {name: curvature.folded_weight(name) for name in statistics.covariances}
    arguments = []
    for reading in members:
        G = factor_blocks(curvature.factors[f"{reading.layer}.G"])[reading.group]
        if criterion == "obs":
            assert inverses is not None
            matrix = inverses[reading.layer][reading.group]
        else:
            matrix = statistics.blocks(reading.layer)[reading.group]
        V = weights[reading.layer].unflatten(0, (-1, G.shape[0]))[reading.group].to(matrix.dtype)
        arguments.append((*ordered(V, matrix, reading.entries), G, reading.entries.shape[1]))
    score = kfac_ext.obs_saliency if criterion == "obs" else kfac_ext.obd_saliency
    return summed(groups, members, scored(curvature, score, arguments))


def scored(
    curvature: Curvature, score: Callable[..., list[Tensor]], arguments: Sequence[tuple[Any, ...]]
) -> list[Tensor]:
    """The scores of the neurons of every reading, of which ranks share the work.

    Args:
        curvature: of the model.
        score: of a list of each argument.
        arguments: (V, A or H, G, block) of every reading.
    """

    def made(chosen: Sequence[tuple[Any, ...]]) -> list[Tensor]:
        return score(*(list(column) for column in zip(*chosen))) if chosen else []

    group = curvature.group
    costs = [float(V.shape[1]) * len(G) * (len(G) + block) for V, _, G, block in arguments]
    owners = None if group is None else group.shares(costs)
    if group is None or owners is None:
        return made(arguments)
    with group.raising_together():
        own = made([argument for argument, owner in zip(arguments, owners) if owner == group.rank])
    sizes = [V.shape[1] // block for V, _, _, block in arguments]
    own = [values[:size] for values, size in zip(own, [s for s, owner in zip(sizes, owners) if owner == group.rank])]
    return group.gathered(owners, own, sizes, arguments[0][0], "shared scores")


def summed(groups: Sequence[NeuronGroup], members: Sequence[Reading], values: Sequence[Tensor]) -> list[Tensor]:
    """What all readings add up to: float64 [neurons] of every group, on the CPU."""
    totals = [torch.zeros(group.width, dtype=torch.float64) for group in groups]
    for reading, found in zip(members, values):
        totals[reading.position].index_add_(0, reading.neurons, found[: len(reading.neurons)].double().cpu())
    for group, total in zip(groups, totals):
        if not bool(total.isfinite().all()):
            raise ValueError(f"{group.name}: the scores of its neurons are not finite")
    return totals


def ordered(V: Tensor, matrix: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """V and A (or H) with each neuron's columns side by side, neuron after neuron."""
    order = columns.flatten()
    if V.shape[1] - len(order) <= 1 and torch.equal(order, torch.arange(len(order))):
        return V, matrix  # only the constant is left over, at the end
    order = order.to(V.device)
    return V.index_select(1, order), matrix.index_select(0, order).index_select(1, order)


@torch.no_grad()
def compensation(
    curvature: Curvature,
    layers: Layers,
    groups: Sequence[NeuronGroup],
    pruned: Mapping[int, Tensor],
    inverses: Mapping[str, tuple[Tensor, ...]],
) -> dict[str, Tensor]:
    """New values of the weights that read the pruned neurons, so that the survivors make up for them.

    W_K <- W_K - W_J (H_JJ)^-1 H_JK for each consumer, J all pruned columns, K the rest with the constant; on the raw
    weights. The constant part goes into the bias; without one, it is subtracted from the batch norm's running mean.
    All layers in one call of `kfac_ext.compensate`.

    Args:
        curvature: knows the batch norm behind each layer.
        layers: those with factors, by the names of their weights.
        groups: the neuron groups.
        pruned: position in `groups` -> int64 [m] neurons that go.
        inverses: H of every consumer.

    Returns:
        Qualified tensor name -> new values of the old shape (pruned columns are left as they were), for
        `flatprune.cutting.surgery.plan`.
    """
    arguments: list[tuple[Tensor, Tensor, Tensor]] = []
    lost = lost_channels(layers, groups, pruned, CONSUMER)
    for layer, channels in lost:
        full = raw_weight(layer, inverses[layer.name][0])
        for part, of_group in enumerate(channels.view(layer.groups, -1)):
            columns = input_columns(layer, of_group.nonzero()).flatten().to(full.device)
            arguments.append((full.unflatten(0, (layer.groups, -1))[part], inverses[layer.name][part], columns))
    if not arguments:
        return {}
    kept = iter(kfac_ext.compensate(*(list(column) for column in zip(*arguments))))
    rows = iter(arguments)
    values: dict[str, Tensor] = {}
    for layer, _ in lost:
        parts = [_scatter(*next(rows), next(kept)) for _ in inverses[layer.name]]
        values.update(tensors_of_weight(curvature, layer.name, torch.cat(parts)))
    return values


def raw_weight(layer: Layer, inverse: Tensor) -> Tensor:
    """The raw weight as a matrix [O, d], with the bias (or zeros) as a last column if the inverse has one for the 1."""
    weight = layer.weight_matrix().to(inverse.dtype)
    if inverse.shape[0] == weight.shape[1]:
        return weight
    column = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias
    return torch.cat([weight, column.to(inverse.dtype)[:, None]], dim=1)


def _scatter(full: Tensor, _inverse: Tensor, pruned: Tensor, kept: Tensor) -> Tensor:
    """`full` with `kept` in the columns that stay."""
    stay = torch.ones(full.shape[1], dtype=torch.bool, device=full.device)
    stay[pruned] = False
    result = full.clone()
    result[:, stay] = kept
    return result


def tensors_of_weight(curvature: Curvature, name: str, full: Tensor) -> dict[str, Tensor]:
    """The inverse of `raw_weight`, by the names of the tensors.

    The 1's column of a layer without a bias is subtracted from the running mean of the batch norm behind it.
    """
    layer = curvature.layers[name]
    weight, bias = layer.weight, layer.bias
    size = layer.patch_size
    values = {layer.weight_name: layer.weight_like(full[:, :size]).to(weight.dtype)}
    if full.shape[1] == size:
        return values
    constant = full[:, size]
    if bias is not None:
        values[str(layer.bias_name)] = constant.to(bias.dtype)
    elif layer.norm is not None and layer.norm.running_mean is not None:
        mean = layer.norm.running_mean
        values[tensor_name(str(layer.norm_name), "running_mean")] = mean - constant.to(mean.dtype)
    return values
