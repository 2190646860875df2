"""Criteria on the rows that make a neuron, under the Kronecker-factored curvature of the layer that produces it.

Row i of V (batch norm folded, constant included) makes z_i; without the neuron it is zero. The change of the loss is
1/2 tr(dV^T G dV A), for rows J alone 1/2 tr(V_J A V_J^T G_JJ). With P = (G + D)^-1 the other rows K can make up for it:

    dV_K = -P_KJ (P_JJ)^-1 V_J        change of the loss 1/2 tr(V_J A V_J^T (P_JJ)^-1)

which is the minimum over dV_K for all rows J that go at once (`row_compensation` solves that block; the single updates
of the rows do not add up to it). What other layers produce of the same neuron (a residual sum) is added up, without
the cross terms between layers that the block-diagonal curvature does not have.

Source of all: Wang, Grosse, Fidler & Zhang 2019, EigenDamage, arXiv 1905.05934. Its code scores with (V o V) A in place
of v^T A v, and does not damp; here the form is the quadratic one, and D = 0.01 mean(diag).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import kfac_ext
from flatprune.coupling import PRODUCER
from flatprune.coupling.neurons import tensor_name
from flatprune.criteria.base import Criterion, Scores, ScoringContext
from flatprune.criteria.members import Reading, lost_channels, readings
from flatprune.criteria.saliency import ordered, scored, summed
from kfac_ext.layers import Layer

_SOURCE = "Wang et al. 2019, EigenDamage, arXiv 1905.05934"
_LEAST_SCALE = 1e-6  # a batch norm that scales a row by less cannot pass a change on to its output


class _Rows:
    """The rows of all neurons, reading by reading, with V, A and G of their group."""

    def __init__(self, context: ScoringContext) -> None:
        self.groups, self.curvature = context.groups, context.curvature
        self.members = readings(context.layers, context.groups, PRODUCER)
        self.statistics = context.statistics(PRODUCER)
        self.gradients = context.gradient_factors(PRODUCER)
        self._weights = {name: context.curvature.folded_weight(name) for name in self.gradients}

    def weight(self, reading: Reading) -> Tensor:
        """V of the reading's group, [rows, d]."""
        A = self.inputs(reading)
        parts = len(self.gradients[reading.layer])
        return self._weights[reading.layer].unflatten(0, (parts, -1))[reading.group].to(A.dtype)

    def inputs(self, reading: Reading) -> Tensor:
        """A of the reading's group."""
        return self.statistics.blocks(reading.layer)[reading.group]


def kron_obd_scores(context: ScoringContext) -> Scores:
    """S_j = 1/2 tr(V_J A V_J^T G_JJ): for one row 1/2 G_ii v_i^T A v_i."""
    return _row_scores(_Rows(context), context.gradient_factors(PRODUCER), kfac_ext.obd_saliency)


def kron_obs_scores(context: ScoringContext) -> Scores:
    """S_j = 1/2 tr(V_J A V_J^T (P_JJ)^-1), P = (G + D)^-1: for one row 1/2 v_i^T A v_i / P_ii."""
    return _row_scores(_Rows(context), context.output_inverses(), kfac_ext.obs_saliency)


def _row_scores(rows: _Rows, outputs: Mapping[str, tuple[Tensor, ...]], score: Callable[..., list[Tensor]]) -> Scores:
    """The kernels for columns J of V under G and A, on V^T under A and G."""
    arguments = []
    for reading in rows.members:
        matrix = outputs[reading.layer][reading.group]
        A = rows.inputs(reading)
        transposed = rows.weight(reading).mT
        arguments.append((*ordered(transposed, matrix, reading.entries), A, reading.entries.shape[1]))
    return summed(rows.groups, rows.members, scored(rows.curvature, score, arguments))


def c_obd_scores(context: ScoringContext) -> Scores:
    """S_j = 1/2 sum over the weights w_rc of rows J of F_rc w_rc^2, F_rc = G_rr A_cc the diagonal of the Fisher."""
    rows = _Rows(context)
    return _weight_scores(
        rows,
        lambda reading: rows.gradients[reading.layer][reading.group].diagonal(),
        lambda reading: rows.inputs(reading).diagonal(),
    )


def c_obs_scores(context: ScoringContext) -> Scores:
    """S_j = 1/2 sum over the weights w_rc of rows J of w_rc^2 / (P_rr H_cc), P = (G + D)^-1, H = (A + D)^-1."""
    rows, P, H = _Rows(context), context.output_inverses(), context.inverses(PRODUCER)
    return _weight_scores(
        rows,
        lambda reading: P[reading.layer][reading.group].diagonal().reciprocal(),
        lambda reading: H[reading.layer][reading.group].diagonal().reciprocal(),
    )


def _weight_scores(rows: _Rows, of_row: Callable[[Reading], Tensor], of_column: Callable[[Reading], Tensor]) -> Scores:
    """1/2 sum over rows r of J and columns c of of_row[r] of_column[c] V_rc^2."""
    found = []
    for reading in rows.members:
        values = 0.5 * of_row(reading) * (rows.weight(reading).square() @ of_column(reading))
        found.append(values[reading.entries.to(values.device)].sum(dim=1))
    return summed(rows.groups, rows.members, found)


@torch.no_grad()
def row_compensation(context: ScoringContext, pruned: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """New values of the rows that stay: V_K <- V_K - P_KJ (P_JJ)^-1 V_J, J all rows of a layer that go.

    Behind a batch norm the raw weights become V_K / scale, and its statistics, gamma and beta those that give V_K both
    with the running and with batch statistics: mean and variance of the new raw output follow from A. Rows that the
    batch norm silences stay as they are, as do those behind a batch norm without gamma and beta.

    Args:
        context: gives V, A and P.
        pruned: position of a group -> int64 [m] neurons that go.

    Returns:
        Qualified tensor name -> new values of the old shape (pruned rows are left as they were).
    """
    inverses = context.output_inverses()
    statistics = context.statistics(PRODUCER)
    values: dict[str, Tensor] = {}
    for layer, lost in lost_channels(context.layers, context.groups, pruned, PRODUCER):
        new = _without_rows(layer.folded_weight(), inverses[layer.name], lost.view(layer.groups, -1))
        values.update(_as_tensors(layer, new, statistics.blocks(layer.name)))
    return values


def _without_rows(V: Tensor, inverses: Sequence[Tensor], lost: Tensor) -> Tensor:
    """V [O, d] with the rows that stay updated; `lost` [groups, rows of a group]."""
    new = V.clone()
    parts = new.unflatten(0, (len(inverses), -1))
    for part, P, pruned in zip(parts, inverses, lost.to(V.device)):
        (kept,) = kfac_ext.compensate([part.mT.to(P.dtype)], [P], [pruned.nonzero().flatten()])
        part[~pruned] = kept.mT.to(part.dtype)
    return new


def _as_tensors(layer: Layer, new: Tensor, As: Sequence[Tensor]) -> dict[str, Tensor]:
    """The folded rows `new` [O, d (+1)] as tensors of the layer and its batch norm."""
    bias = layer.bias
    if layer.norm is not None:
        return _behind_norm(layer, new, As)
    values = {layer.weight_name: layer.weight_like(new[:, : layer.patch_size])}
    if bias is not None:
        values[str(layer.bias_name)] = new[:, -1]
    return values


def _behind_norm(layer: Layer, new: Tensor, As: Sequence[Tensor]) -> dict[str, Tensor]:
    norm = layer.norm
    assert norm is not None and norm.running_mean is not None and norm.running_var is not None
    if norm.weight is None or norm.bias is None:
        return {}
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    heard = scale.abs() > _LEAST_SCALE
    old = layer.weight_matrix()
    rows = torch.where(heard[:, None], new[:, :-1] / scale[:, None], old)
    mean, variance = (after - before for after, before in zip(_output_moments(rows, As), _output_moments(old, As)))
    running_mean = norm.running_mean + mean
    running_var = (norm.running_var + variance).clamp_min(0.0)
    gamma = norm.weight * ((running_var + norm.eps) / (norm.running_var + norm.eps)).sqrt()
    constant = -running_mean if layer.bias is None else layer.bias - running_mean
    beta = torch.where(heard, new[:, -1] - scale * constant, norm.bias)
    own = {"weight": gamma, "bias": beta, "running_mean": running_mean, "running_var": running_var}
    values = {tensor_name(str(layer.norm_name), key): value for key, value in own.items()}
    return {layer.weight_name: layer.weight_like(rows), **values}


def _output_moments(weight: Tensor, As: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance [O] of the outputs of weight [O, d], bias aside, over the inputs that A [d + 1] averages."""
    rows = weight.unflatten(0, (len(As), -1))
    means, seconds = [], []
    for part, A in zip(rows, As):
        values = part.to(A.dtype)
        means.append(values @ A[:-1, -1])
        seconds.append(((values @ A[:-1, :-1]) * values).sum(dim=1))
    mean, second = torch.cat(means), torch.cat(seconds)
    return mean.to(weight.dtype), (second - mean.square()).to(weight.dtype)


KRON_OBD = Criterion(
    "kron_obd",
    kron_obd_scores,
    _SOURCE,
    needs=("factors",),
    role=PRODUCER,
    per_cost=True,
    predicts_loss=True,
)
C_OBD = replace(KRON_OBD, name="c_obd", score=c_obd_scores)
KRON_OBS = Criterion(
    "kron_obs",
    kron_obs_scores,
    _SOURCE,
    needs=("factors", "inverses"),
    role=PRODUCER,
    per_cost=True,
    predicts_loss=True,
    compensates="always",
    compensation=row_compensation,
)
C_OBS = replace(KRON_OBS, name="c_obs", score=c_obs_scores)
