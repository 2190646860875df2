"""Parameters while the network is tried: shape and dtype of what they stand for, numbers when an operator wants them.

Of each large parameter, cut or not, the model sees a *stand-in* of the right shape, strides and dtype, in memory that
all share and nobody reads. Each operator gets numbers in its place: those of the original, cut and converted. So
neither a copy of the model in float64 nor one that is cut is ever in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flatprune.coupling.cuts import Cut, cut_shape, cut_tensor

_LARGE = 1 << 12  # entries from which on a parameter has a stand-in
_BLOCK = 1 << 18  # entries of a matrix that are converted at a time


@dataclass
class StandIn:
    """What stands behind a stand-in.

    Attributes:
        original: whole, of its own dtype.
        cuts: what stays of it.
        dtype: that the model sees.
        shape, strides: that the model sees.
        written: the numbers, once an operator wrote to them.
    """

    original: Tensor
    cuts: Sequence[Cut]
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    written: Tensor | None = None

    def numbers(self) -> Tensor:
        """All of them."""
        if self.written is not None:
            return self.written
        return (cut_tensor(self.original, self.cuts) if self.cuts else self.original).to(self.dtype)

    def to_write(self) -> Tensor:
        """All of them, in memory from now on."""
        self.written = self.numbers()
        return self.written

    @property
    def is_matrix(self) -> bool:
        """Whether `blocks` has them."""
        return self.written is None and len(self.shape) == 2 and all(cut.groups == 1 for cut in self.cuts)

    def blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        """A matrix, some rows after the others: (first, behind the last, rows)."""
        kept = {cut.dim: cut.kept.to(self.original.device) for cut in self.cuts}
        step = max(1, _BLOCK // max(1, self.shape[1]))
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            rows = self.original.index_select(0, kept[0][start:stop]) if 0 in kept else self.original[start:stop]
            yield start, stop, (rows.index_select(1, kept[1]) if 1 in kept else rows).to(self.dtype)

    @property
    def is_table(self) -> bool:
        """Whether `cut_rows` has them."""
        return self.is_matrix and all(cut.dim == 1 for cut in self.cuts)

    def cut_rows(self, rows: Tensor) -> Tensor:
        """Rows [..., columns] of the original as the model sees them."""
        for cut in self.cuts:
            rows = rows.index_select(-1, cut.kept.to(rows.device))
        return rows.to(self.dtype)


class StandIns:
    """The stand-ins of a model's large parameters.

    Args:
        tensors: all parameters and buffers.
        double: the model sees float64, whatever the originals are.
    """

    def __init__(self, tensors: Iterable[Tensor], *, double: bool) -> None:
        self._double = double
        self._places: dict[int, tuple[Tensor, int]] = {}  # id of a parameter -> memory, and where in it
        self._known: dict[int, StandIn] = {}  # address -> what stands behind it
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for tensor in tensors:
            if isinstance(tensor, nn.Parameter) and tensor.numel() >= _LARGE and _is_dense(tensor):
                kinds.setdefault((tensor.device, self._dtype(tensor)), []).append(tensor)
        for (device, dtype), alike in kinds.items():
            memory = torch.empty(max(t.numel() for t in alike) + len(alike), dtype=dtype, device=device)
            self._places.update({id(t): (memory, place) for place, t in enumerate(alike)})

    def _dtype(self, tensor: Tensor) -> torch.dtype:
        return torch.float64 if self._double and tensor.is_floating_point() else tensor.dtype

    def behind(self, tensor: Tensor) -> tuple[StandIn, bool] | None:
        """What stands behind a tensor, and whether it is seen transposed; None if the tensor is none."""
        if not self._known or not tensor.is_floating_point():
            return None
        try:
            found = self._known.get(tensor.data_ptr())
        except RuntimeError:  # it has no memory of its own: a sparse one, say
            return None
        if found is None:
            return None
        seen = tuple(tensor.shape), tensor.stride()
        if seen == (found.shape, found.strides):
            return found, False
        if len(found.shape) == 2 and seen == (found.shape[::-1], found.strides[::-1]):
            return found, True
        return None

    def numbers(self, tensor: Tensor) -> Tensor:
        """A tensor's numbers: its own, if it is no stand-in."""
        behind = self.behind(tensor)
        if behind is None:
            return tensor
        return behind[0].numbers().t() if behind[1] else behind[0].numbers()

    @contextmanager
    def seen(self, tensor: Tensor, cuts: Sequence[Cut] = ()) -> Iterator[None]:
        """The model sees a parameter or buffer cut, and in float64 if all are."""
        before, behind = tensor.data, self.behind(tensor)
        if id(tensor) not in self._places:
            data = cut_tensor(before, cuts) if cuts else before
            with holding(tensor, data.to(self._dtype(tensor))):
                yield
            return
        memory, place = self._places[id(tensor)]
        original = before if behind is None else behind[0].original if behind[0].written is None else behind[0].written
        shape, strides = cut_shape(original, cuts) if cuts else (tuple(original.shape), original.stride())
        now = StandIn(original, cuts, memory.dtype, shape, strides)
        data = memory.as_strided(shape, strides, place)
        address = data.data_ptr()
        outer = self._known.get(address)
        self._known[address] = now
        try:
            with holding(tensor, data):
                yield
        finally:
            if outer is None:
                del self._known[address]
            else:
                self._known[address] = outer


def _is_dense(tensor: Tensor) -> bool:
    return sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride())) + 1 == tensor.numel()


@contextmanager
def holding(tensor: Tensor, data: Tensor) -> Iterator[None]:
    """A parameter or buffer with other data."""
    before = tensor.data
    tensor.data = data
    try:
        yield
    finally:
        tensor.data = before
