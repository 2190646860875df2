"""Neurons that go one after the other, each score knowing what went before: a block-pivoted Cholesky factorisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kfac_ext import reference
from kfac_ext.geometry import is_int
from kfac_ext.ops._greedy_checks import check_columns, check_layers, check_step
from kfac_ext.ops._greedy_kernels import Layer, Neurons, fits_cuda, run_cpu, run_cuda
from kfac_ext.ops._launch import full_precision
from kfac_ext.ops._library import define, native_device
from kfac_ext.ops._lists import as_list, check_count, row_major

__all__ = ["GreedyChoice", "GreedySelection", "greedy_selection"]

_OPERATION = _FAMILY = "greedy_selection"
_PENDING = 64  # columns that go before V is updated: wide enough for a fast product, and few to work around

# ---- a step ----


def _remove(
    weights: list[Tensor],
    inverses: list[Tensor],
    Gs: list[Tensor],
    removed: list[Tensor],
    pending: list[Tensor],
    counts: list[int],
    lost: list[Tensor],
    columns: list[Tensor],
    layers: list[int],
    blocks: list[Tensor],
    forms: list[Tensor],
    scores: list[Tensor],
) -> tuple[Tensor, Tensor]:
    _check_counts(
        len(weights), inverses=inverses, Gs=Gs, removed=removed, pending=pending, counts=counts[::2], lost=lost
    )
    _check_counts(len(weights), counts=counts[1::2])
    _check_counts(len(columns), layers=layers, blocks=blocks, forms=forms, scores=scores)
    problems = list(map(Layer, weights, inverses, Gs, removed, counts[::2], pending, counts[1::2], lost))
    lists = list(map(Neurons, columns, layers, blocks, forms, scores))
    check_step(_OPERATION, problems, lists)
    if native_device(_OPERATION, weights[0], _FAMILY) and (weights[0].is_cpu or fits_cuda(problems, lists)):
        return _run(problems, lists)
    state = (weights, inverses, Gs, removed, pending, counts, lost, columns, layers, blocks, forms, scores)
    return reference.greedy_remove_(*state)


def _check_counts(wanted: int, **lists: Sequence[object]) -> None:
    for name, given in lists.items():
        check_count(_OPERATION, name, len(given), wanted, "them")


def _run(layers: list[Layer], lists: list[Neurons]) -> tuple[Tensor, Tensor]:
    return (run_cpu if layers[0].weight.is_cpu else run_cuda)(layers, lists)


def _remove_fake(weights: list[Tensor], *_state: object) -> tuple[Tensor, Tensor]:
    first = weights[0]
    return first.new_empty(len(weights), dtype=torch.float64), first.new_empty((len(weights), 3), dtype=torch.int64)


_remove_op = define(
    "greedy_remove_(Tensor(a!)[] weights, Tensor(b!)[] inverses, Tensor[] Gs, Tensor(c!)[] removed, "
    "Tensor(d!)[] pending, int[] counts, Tensor[] lost, Tensor[] columns, int[] layers, Tensor(e!)[] blocks, "
    "Tensor(f!)[] forms, Tensor(g!)[] scores) -> (Tensor, Tensor)",
    _remove,
    _remove_fake,
)

# ---- the whole ----


class NotDefiniteError(torch.linalg.LinAlgError):
    """An H_JJ that is not positive definite.

    Attributes:
        layer: number of the layer.
        columns: number of the list of `columns` whose neuron's block it is; None where it is that of all that go.
        neuron: in that list, or None.
    """

    def __init__(self, message: str, layer: int, columns: int | None = None, neuron: int | None = None) -> None:
        super().__init__(f"{_OPERATION}: {message}")
        self.layer, self.columns, self.neuron = layer, columns, neuron


def _indices(number: int, index: Sequence[int] | Tensor) -> list[int]:
    """Indices of neurons as a list."""
    listed = (
        index.flatten().tolist() if isinstance(index, Tensor) else list(index) if isinstance(index, Sequence) else []
    )
    if not isinstance(index, (Tensor, Sequence)) or not all(is_int(i) for i in listed):
        raise TypeError(f"{_OPERATION}: neurons[{number}] is {index!r}, expected a list of ints")
    return listed


def _together(layer: int) -> NotDefiniteError:
    where = "at the columns of the neurons that go"
    return NotDefiniteError(f"inverses[{layer}] is not positive definite {where}", layer)


def _column_forms(V: Tensor, G: Tensor, columns: Tensor) -> Tensor:
    """V_J^T G V_J [neurons, block, block] of the columns J of every neuron."""
    with full_precision(V.device):
        read = V.mT.index_select(0, columns.flatten())  # [neurons block, O], each column in one piece
        through = (read @ G).view(*columns.shape, -1)
        return read.view_as(through) @ through.mT


class GreedySelection:
    """Scores of neurons that take into account which went before, kept up to date while one after the other goes.

    S_j = 1/2 tr(V_J^T G V_J (H_JJ)^-1), summed over the layers that neuron j feeds: optimal brain surgeon for a block
    of columns (Hassibi & Stork 1992), where V and H are those that the removals so far have left,

        V <- V - V_J (H_JJ)^-1 H_J.        H <- H - H_.J (H_JJ)^-1 H_J.

    The changes add up to 1/2 tr(V_S^T G V_S (H_SS)^-1) of all columns S that went. What is computed is a Cholesky
    factorisation of H with blocks as pivots: H now is H - L L^T, and a removal costs one pass over L and one over V,
    where updates of H would cost one over all of it and new scores a product with G.

    Args:
        weights: V of each layer, [O, d], float32 or float64, of one dtype and device.
        inverses: H = (A + D)^-1 of each layer, [d, d], symmetric positive definite, from `damped_inverse`.
        Gs: [O, O] covariance of the gradients at its outputs, symmetric.
        columns: lists of neurons, int64 [neurons, block]: the columns of one layer that each feeds. Columns of no
            neuron (a bias) stay.
        layers: the layer of each list; default: one list a layer, in order.
        overwrite: work in the memory of `inverses`, which are worth nothing afterwards.

    Attributes:
        scores: float64 [neurons] a list: what the layer loses with each neuron now, infinite for those that went. A
            neuron that stands in several lists loses the sum.
        total: what has been lost so far.

    Raises:
        torch.linalg.LinAlgError: naming the layer and a neuron whose block H_JJ is not positive definite.
        TypeError, ValueError: naming the argument and its place in the list.

    Example:
        >>> V, H, G = torch.tensor([[1.0, 2.0, 3.0]]), torch.eye(3), torch.eye(1)
        >>> selection = kfac_ext.GreedySelection([V], [H], [G], [torch.arange(3)[:, None]])
        >>> selection.remove_({0: [0]}), selection.scores
        (0.5, [tensor([   inf, 2.0000, 4.5000], dtype=torch.float64)])
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        inverses: Sequence[Tensor],
        Gs: Sequence[Tensor],
        columns: Sequence[Tensor],
        layers: Sequence[int] | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        Vs, Hs = as_list(_OPERATION, "weights", weights), as_list(_OPERATION, "inverses", inverses)
        self._Gs, index = as_list(_OPERATION, "Gs", Gs), as_list(_OPERATION, "columns", columns)
        self._layers = list(range(len(index))) if layers is None else list(layers)
        check_layers(_OPERATION, Vs, Hs, self._Gs)
        if layers is None:
            check_count(_OPERATION, "columns", len(index), len(Vs), "weights")
        check_columns(_OPERATION, index, self._layers, Vs)
        self._Gs = [row_major(G) for G in self._Gs]
        self._Vs = [V.clone(memory_format=torch.contiguous_format) for V in Vs]
        self._Hs = [row_major(H) if overwrite else H.clone(memory_format=torch.contiguous_format) for H in Hs]
        device = Vs[0].device
        self._columns = [listed.to(device).contiguous() for listed in index]
        self._removed = [self._columns[0].new_empty(V.shape[1]) for V in Vs]
        self._pending = [V.new_empty(min(_PENDING, V.shape[1]), len(V)) for V in Vs]
        self._counts = [[0, 0] for _ in Vs]  # columns that went, and of these those that are pending
        self._left = [set(range(len(listed))) for listed in self._columns]
        self._blocks, self._forms = [], []
        for listed, layer in zip(self._columns, self._layers):
            self._blocks.append(self._Hs[layer][listed[:, :, None], listed[:, None, :]].double())
            self._forms.append(_column_forms(self._Vs[layer], self._Gs[layer], listed).double())
        self.scores = [listed.new_zeros(len(listed), dtype=torch.float64) for listed in self._columns]
        self.total = 0.0
        self._is_broken = False
        self._step({layer: [] for layer in range(len(Vs))})

    def remove_(self, neurons: Mapping[int, Sequence[int] | Tensor]) -> float:
        """Let neurons go, all at once.

        Args:
            neurons: number of a list of `columns` -> indices of neurons in it, distinct ones that are left.

        Returns:
            What is lost by it, 1/2 tr(V_J^T G V_J (H_JJ)^-1) of all their columns J together.

        Raises:
            torch.linalg.LinAlgError: naming the layer where H_JJ is not positive definite: nothing has gone then; or
                one where the block of a neuron that stays no longer is: the scores are no use then. It has the
                numbers as attributes (`layer`, `columns`, `neuron`).
            ValueError: a number of no list; an index that is none, or of a neuron that went.
            RuntimeError: an earlier removal ended midway, for lack of memory.
        """
        self._check_whole()
        chosen = self._chosen(neurons)
        lost = self._columns_of(chosen)
        change = self._step(lost) if lost else 0.0
        for number, index in chosen.items():
            self._left[number].difference_update(index)
        self.total += change
        return change

    def change(self, neurons: Mapping[int, Sequence[int] | Tensor]) -> float:
        """What `remove_` of the same neurons would lose; nothing goes. Of one neuron that is its score.

        Raises:
            torch.linalg.LinAlgError, ValueError, RuntimeError: as `remove_`.
        """
        self._check_whole()
        found = 0.0
        for layer, listed in self._columns_of(self._chosen(neurons)).items():
            J = torch.cat(listed)
            V, H, G = self._Vs[layer], self._Hs[layer], self._Gs[layer].double()
            removed, waiting = self._counts[layer]
            L = H[self._removed[layer][:removed]]  # row by row, as `reference.greedy_remove_` has it
            lost, latest = L[:, J].double(), L[removed - waiting :, J].double()
            T, info = torch.linalg.cholesky_ex(H[J][:, J].double() - lost.mT @ lost)
            if int(info):
                raise _together(layer)
            V_J = V[:, J].double() - self._pending[layer][:waiting].double().mT @ latest
            P = torch.linalg.solve_triangular(T, V_J.mT, upper=False)
            found += 0.5 * float(((P @ G) * P).sum())
        return found

    def _check_whole(self) -> None:
        if self._is_broken:
            raise RuntimeError(f"{_OPERATION}: a removal ended midway; make a new GreedySelection")

    def _chosen(self, neurons: Mapping[int, Sequence[int] | Tensor]) -> dict[int, list[int]]:
        """The same as lists; ValueError for what has gone or never was there."""
        if not isinstance(neurons, Mapping):
            raise TypeError(f"{_OPERATION}: neurons is a {type(neurons).__name__}, expected a dict of lists of indices")
        chosen = {n: _indices(n, index) for n, index in neurons.items()}
        for number, index in chosen.items():
            if not is_int(number) or not 0 <= number < len(self._left):
                raise ValueError(
                    f"{_OPERATION}: neurons names list {number!r} of columns, expected 0 to {len(self._left) - 1}"
                )
            if len(self._left[number].intersection(index)) < len(index):
                raise ValueError(
                    f"{_OPERATION}: neurons[{number}] is {index}, expected distinct ones of the "
                    f"{len(self._columns[number])} that have not gone"
                )
        return chosen

    def _columns_of(self, chosen: Mapping[int, list[int]]) -> dict[int, list[Tensor]]:
        """Layer -> the columns of chosen neurons, list by list."""
        lost: dict[int, list[Tensor]] = {}
        for number, index in chosen.items():
            if index:
                lost.setdefault(self._layers[number], []).append(self._columns[number][index].flatten())
        return lost

    def _step(self, lost: Mapping[int, list[Tensor]]) -> float:
        touched = sorted(lost)
        numbers = [number for number, layer in enumerate(self._layers) if layer in lost]
        none = self._columns[0].new_empty(0)
        gone = [torch.cat(lost[layer]) if lost[layer] else none for layer in touched]
        self._is_broken = True  # until all is written
        changes, failures = _remove_op(
            *([state[layer] for layer in touched] for state in (self._Vs, self._Hs, self._Gs)),
            *([state[layer] for layer in touched] for state in (self._removed, self._pending)),
            [count for layer in touched for count in self._counts[layer]],
            gone,
            [self._columns[number] for number in numbers],
            [touched.index(self._layers[number]) for number in numbers],
            *([state[number] for number in numbers] for state in (self._blocks, self._forms, self.scores)),
        )
        self._is_broken = False
        for layer, (column, number, neuron) in zip(touched, failures.tolist()):
            if column >= 0:
                raise _together(layer)
            if number >= 0:
                listed = numbers[number]
                block = f"the block of neuron {neuron} of columns[{listed}] in inverses[{layer}]"
                raise NotDefiniteError(f"{block} is not positive definite", layer, listed, neuron)
        for layer, index in zip(touched, gone):
            removed, waiting = self._counts[layer]
            waits = waiting + len(index) <= len(self._pending[layer])
            self._counts[layer] = [removed + len(index), waiting + len(index) if waits else 0]
        return float(changes.sum())

    def weights(self) -> list[Tensor]:
        """V now, [O, d] a layer: with the survivors compensated, and zero in the columns that went.

        Raises:
            RuntimeError: as `remove_`.
        """
        self._check_whole()
        found = []
        for V, H, removed, pending, (count, waiting) in zip(
            self._Vs, self._Hs, self._removed, self._pending, self._counts
        ):
            gone = removed[:count]
            with full_precision(V.device):
                now = V - pending[:waiting].mT @ H[gone[count - waiting :]]
            now[:, gone] = 0.0
            found.append(now)
        return found


class GreedyChoice(NamedTuple):
    """What `greedy_selection` chose.

    Attributes:
        neurons: int64 [count], in the order in which they go.
        scores: float64 [count], what is lost with each of them when it goes.
        weights: V of each layer without them, the survivors compensated, zero in their columns.
    """

    neurons: Tensor
    scores: Tensor
    weights: list[Tensor]


def greedy_selection(
    weights: Sequence[Tensor],
    inverses: Sequence[Tensor],
    Gs: Sequence[Tensor],
    columns: Sequence[Tensor],
    count: int,
) -> GreedyChoice:
    """The `count` neurons that go when each time the one of lowest score does; see `GreedySelection`.

    Args:
        weights, inverses, Gs: of the layers that the neurons feed, as for `GreedySelection`.
        columns: int64 [neurons, block] a layer: the columns that each neuron feeds; equally many neurons in each.
        count: neurons that go, at most all.

    Raises:
        torch.linalg.LinAlgError: naming the layer and a neuron whose block H_JJ is not positive definite.
        TypeError, ValueError: naming the argument and its place in the list; scores that are not finite.

    Example:
        >>> V, H, G = torch.tensor([[1.0, 2.0, 3.0]]), torch.eye(3), torch.eye(1)
        >>> kfac_ext.greedy_selection([V], [H], [G], [torch.arange(3)[:, None]], 2).neurons
        tensor([0, 1])
    """
    selection = GreedySelection(weights, inverses, Gs, columns)
    width = len(columns[0])
    for i, index in enumerate(columns):
        if len(index) != width:
            raise ValueError(
                f"{_OPERATION}: columns[{i}] has {len(index)} neurons, columns[0] {width}: expected as many"
            )
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= width:
        raise ValueError(f"{_OPERATION}: count is {count!r}, expected 0 to {width}, the number of neurons")
    neurons, scores = [], []
    for _ in range(count):
        score = torch.stack(selection.scores).sum(dim=0)
        if bool(score.isnan().any()):
            raise ValueError(f"{_OPERATION}: the score of neuron {int(score.isnan().nonzero()[0])} is not finite")
        best = int(score.argmin())
        scores.append(selection.remove_({number: [best] for number in range(len(columns))}))
        neurons.append(best)
    order, lost = torch.tensor(neurons, dtype=torch.int64), torch.tensor(scores, dtype=torch.float64)
    return GreedyChoice(order, lost, selection.weights())
