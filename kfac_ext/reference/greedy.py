"""Greedy selection: the direct algorithm, and one step of the factorisation that `kfac_ext.GreedySelection` is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def greedy_selection(
    weights: Sequence[Tensor],
    inverses: Sequence[Tensor],
    Gs: Sequence[Tensor],
    columns: Sequence[Tensor],
    count: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The `count` neurons of lowest score one after the other, whole matrices updated each time.

    V <- V - V_J (H_JJ)^-1 H_J. and H <- H - H_.J (H_JJ)^-1 H_J. with J the columns of the neuron that goes (optimal
    brain surgeon, Hassibi & Stork 1992, sequentially); see `kfac_ext.greedy_selection`.
    """
    V, H = [weight.clone() for weight in weights], [inverse.clone() for inverse in inverses]
    left = torch.ones(len(columns[0]), dtype=torch.bool, device=V[0].device)
    neurons, scores = [], []
    for _ in range(count):
        score = torch.stack([_scores(*layer, left) for layer in zip(V, H, Gs, columns)]).sum(dim=0)
        best = int(score.masked_fill(~left, torch.inf).argmin())
        neurons.append(best)
        scores.append(float(score[best]))
        left[best] = False
        for weight, inverse, index in zip(V, H, columns):
            J = index[best]
            update = torch.linalg.solve(inverse[J][:, J], inverse[J])  # (H_JJ)^-1 H_J.
            for matrix in (weight, inverse):
                matrix.addmm_(matrix[:, J], update, alpha=-1.0)
            weight[:, J] = 0.0
            inverse[J] = inverse[:, J] = 0.0
    return torch.tensor(neurons, dtype=torch.int64), torch.tensor(scores, dtype=torch.float64), V


def _scores(V: Tensor, H: Tensor, G: Tensor, columns: Tensor, left: Tensor) -> Tensor:
    """1/2 tr(V_J^T G V_J (H_JJ)^-1) of every neuron, of those that went of any value."""
    read = V[:, columns].transpose(0, 1)  # [neurons, O, block]
    blocks = H[columns[:, :, None], columns[:, None, :]]
    blocks = blocks + torch.diag_embed((~left)[:, None].expand_as(columns).to(H.dtype))
    return 0.5 * torch.linalg.solve(blocks, read.mT @ (G @ read)).diagonal(dim1=1, dim2=2).sum(dim=1).double()


def greedy_remove_(
    weights: Sequence[Tensor],
    inverses: Sequence[Tensor],
    Gs: Sequence[Tensor],
    removed: Sequence[Tensor],
    pending: Sequence[Tensor],
    counts: Sequence[int],
    lost: Sequence[Tensor],
    columns: Sequence[Tensor],
    layers: Sequence[int],
    blocks: Sequence[Tensor],
    forms: Sequence[Tensor],
    scores: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """The columns `lost` of each layer go: a step of a block-pivoted Cholesky factorisation; all arguments as there.

    With T T^T = H_JJ, L_J = H_.J T^-T and P_J = V_.J T^-T: H <- H - L_J L_J^T and V <- V - P_J L_J^T, where row j of
    `inverses` holds the column of L of a column j that went, and P L^T of what is pending is not yet subtracted from V.

    Returns:
        changes float64 [layers], failures int64 [layers, 3]: the place in `lost` where H_JJ is not positive definite;
        list and neuron of one that stays whose block is not; -1 where there is none.
    """
    failures = torch.full((len(weights), 3), -1, dtype=torch.int64, device=weights[0].device)
    changes = torch.zeros(len(weights), dtype=torch.float64, device=weights[0].device)
    steps = []
    for i, (V, H, G, J) in enumerate(zip(weights, inverses, Gs, lost)):
        done, waiting = removed[i][: counts[2 * i]], pending[i][: counts[2 * i + 1]]
        L = H[done]
        now = H[J] - L[:, J].mT @ L
        T, info = torch.linalg.cholesky_ex(now[:, J])
        failures[i, 0] = info - 1
        latest = L[len(done) - len(waiting) :]
        P = torch.linalg.solve_triangular(T, V[:, J].mT - latest[:, J].mT @ waiting, upper=False)  # P^T [q, O]
        new = torch.linalg.solve_triangular(T, now, upper=False)  # rows of L^T [q, n]
        GP = P @ G
        form = P @ GP.mT
        changes[i] = 0.5 * form.diagonal().double().sum()
        steps.append((new, GP @ V - (GP @ waiting.mT) @ latest - 0.5 * form @ new, P, latest))
    if bool((failures[:, 0] >= 0).any()):
        return changes, failures
    for i, (V, H, J, (new, form_rows, P, latest)) in enumerate(zip(weights, inverses, lost, steps)):
        H[J] = new
        removed[i][counts[2 * i] : counts[2 * i] + len(J)] = J
        _postpone(V, pending[i], counts[2 * i + 1], P, torch.cat([latest, new]))
        went = torch.zeros(V.shape[1], dtype=torch.bool, device=V.device)
        went[removed[i][: counts[2 * i] + len(J)]] = True
        for number, layer in enumerate(layers):
            if layer == i:
                state = blocks[number], forms[number], scores[number]
                _update_scores(i, number, columns[number], new.double(), form_rows.double(), went, *state, failures)
    return changes, failures


def _postpone(V: Tensor, pending: Tensor, count: int, P: Tensor, latest: Tensor) -> None:
    """P joins what is pending, or all of it is subtracted from V if it is too much."""
    if count + len(P) <= len(pending):
        pending[count : count + len(P)] = P
    else:
        V.addmm_(torch.cat([pending[:count], P]).mT, latest, alpha=-1.0)


def _update_scores(
    layer: int,
    number: int,
    columns: Tensor,
    new: Tensor,
    form_rows: Tensor,
    went: Tensor,
    blocks: Tensor,
    forms: Tensor,
    scores: Tensor,
    failures: Tensor,
) -> None:
    """The diagonal blocks of H and V^T G V at each neuron's columns, and its score."""
    x, y = new[:, columns].transpose(0, 1), form_rows[:, columns].transpose(0, 1)  # [neurons, q, block]
    blocks -= x.mT @ x
    cross = y.mT @ x
    forms -= cross + cross.mT
    gone = went[columns[:, 0]]
    eye = torch.eye(columns.shape[1], dtype=torch.float64, device=columns.device)
    factors, info = torch.linalg.cholesky_ex(torch.where(gone[:, None, None], eye, blocks))
    traces = torch.cholesky_solve(forms, factors).diagonal(dim1=1, dim2=2).sum(dim=1)
    scores.copy_(torch.where(gone, torch.inf, 0.5 * traces))
    if bool(info.any()) and int(failures[layer, 1]) < 0:
        failures[layer, 1], failures[layer, 2] = number, info.nonzero()[0, 0]
