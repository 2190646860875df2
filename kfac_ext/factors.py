"""FactorSet: every Kronecker factor of a model in one flat buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kfac_ext.ops.covariance_group import CovarianceUpdate, covariance_group_
from kfac_ext.ops.inverse import damped_inverse_ex
from kfac_ext.ops.power import PowerIteration, power_iteration_at_
from kfac_ext.reference.power import start_vector

Size: TypeAlias = "int | tuple[int, int]"

_ALIGNMENT = 64  # bytes: a cache line, and what vector loads and bulk copies want


class FactorSet:
    """Symmetric matrices [n, n] (or [groups, n, n]) with their dominant eigenpairs, addressed by key.

    All matrices lie in one contiguous tensor `buffer` in slots of 64-byte alignment, all eigenvectors in a second
    one, `vectors`; what `factors[key]` returns is an ordinary view. So one call works on all layers, a distributed
    mean is one all-reduce of `buffer`, and saving is a few tensors and an index.

    Args:
        sizes: key -> n, or key -> (groups, n) for one block a group.
        dtype: float32 or float64.
        device: where the buffers live.

    Example:
        >>> factors = FactorSet({"fc.A": 3, "fc.G": 2})
        >>> _ = kfac_ext.linear_covariance_(factors["fc.A"], torch.randn(8, 3), decay=0.95, scale=0.05)
        >>> factors["fc.A"].shape
        torch.Size([3, 3])
    """

    def __init__(
        self,
        sizes: Mapping[str, Size],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"FactorSet: dtype is {dtype}, expected torch.float32 or torch.float64")
        self._lay_out(sizes, dtype, device)
        for key, size in self.sizes.items():
            self.vector(key).copy_(start_vector(_groups_and_n(size)[1], dtype, device))

    @classmethod
    def _without_starts(cls, sizes: Mapping[str, Size], dtype: torch.dtype, device: torch.device | str) -> FactorSet:
        """A set whose eigenvectors are zero: power iteration begins at its start all the same."""
        result = cls.__new__(cls)
        result._lay_out(sizes, dtype, device)
        return result

    def _lay_out(self, sizes: Mapping[str, Size], dtype: torch.dtype, device: torch.device | str) -> None:
        """Buffers of zeros, and the views that keys name."""
        self.sizes = {key: _checked_size(key, size) for key, size in sizes.items()}
        step = _ALIGNMENT // dtype.itemsize
        matrix_end = vector_end = value_end = 0
        self._slots: dict[str, tuple[int, int, int]] = {}
        for key, size in self.sizes.items():
            groups, n = _groups_and_n(size)
            self._slots[key] = (matrix_end, vector_end, value_end)
            matrix_end += -(-groups * n * n // step) * step
            vector_end += -(-groups * n // step) * step
            value_end += groups
        self.buffer = torch.zeros(matrix_end, dtype=dtype, device=device)
        self.vectors = torch.zeros(vector_end, dtype=dtype, device=device)
        self.eigenvalues = torch.zeros(value_end, dtype=dtype, device=device)
        self._matrix_views = {key: self._view(self.buffer, key, 2) for key in self.sizes}
        self._vector_views: dict[str, Tensor] = {}  # made when they are asked for

    def _view(self, memory: Tensor, key: str, dims: int) -> Tensor:
        """The matrices (2 dims) or vectors (1) of a key in their memory."""
        size = self.sizes[key]
        groups, n = _groups_and_n(size)
        shape, strides = (groups, *(n,) * dims), (n**dims, *(n, 1)[-dims:])
        lead = 0 if isinstance(size, tuple) else 1
        return memory.as_strided(shape[lead:], strides[lead:], self._slots[key][2 - dims])

    @classmethod
    def of(cls, matrices: Mapping[str, Tensor]) -> FactorSet:
        """A set of copies of these matrices [n, n] or [groups, n, n], all of one dtype and device."""
        first = next(iter(matrices.values()))
        sizes = {key: _size_of(matrix) for key, matrix in matrices.items()}
        result = cls(sizes, dtype=first.dtype, device=first.device)
        for key, matrix in matrices.items():
            result[key].copy_(matrix)
        return result

    def __getitem__(self, key: str) -> Tensor:
        """The matrix (or [groups, n, n] matrices) of `key`, a view."""
        return self._matrix_views[key]

    def __contains__(self, key: object) -> bool:
        return key in self.sizes

    def __iter__(self) -> Iterator[str]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def vector(self, key: str) -> Tensor:
        """The last dominant eigenvector [n] (or [groups, n]) of `key`, a view of unit rows."""
        view = self._vector_views.get(key)
        if view is None:
            view = self._vector_views[key] = self._view(self.vectors, key, 1)
        return view

    def eigenvalue(self, key: str) -> Tensor:
        """The last dominant eigenvalue [] (or [groups]) of `key`, a view."""
        start = self._slots[key][2]
        size = self.sizes[key]
        return self.eigenvalues[start : start + size[0]] if isinstance(size, tuple) else self.eigenvalues[start]

    def accumulate_(self, updates: Iterable[CovarianceUpdate]) -> None:
        """Blend covariances into the factors they name: one launch over all layers on CUDA, a loop on the CPU.

        Args:
            updates: as hooks have collected them; a factor may come more than once, then in that order.

        Raises:
            KeyError: naming an update's key that is no factor.
            TypeError, ValueError: an update does not fit; no factor is changed then.

        Example:
            >>> factors = FactorSet({"fc.A": 4, "fc.G": 2})
            >>> x, g = torch.randn(8, 3), torch.randn(8, 2)
            >>> factors.accumulate_([
            ...     CovarianceUpdate.linear("fc.A", x, bias=True, decay=0.95, scale=0.05),
            ...     CovarianceUpdate.gradient("fc.G", g, decay=0.95, scale=0.05),
            ... ])
        """
        updates = list(updates)
        for update in updates:
            if update.key not in self.sizes:
                raise KeyError(f"FactorSet.accumulate_: no factor named {update.key!r}")
        covariance_group_([self[update.key] for update in updates], updates)

    def power_iteration_(
        self, keys: Iterable[str] | None = None, *, tol: float = 1e-3, max_iter: int = 100
    ) -> PowerIteration:
        """Update eigenvalue and eigenvector of the factors named (default: all) from where they stand.

        As `kfac_ext.power_iteration_` over all blocks in one call; returns its result, blocks in the order of the keys.
        """
        names = list(self.sizes if keys is None else keys)
        matrices = [block for key in names for block in _blocks(self[key], 3)]
        vectors = [block for key in names for block in _blocks(self.vector(key), 2)]
        starts = [start for key in names for start in self._vector_starts(key)]
        found = power_iteration_at_(self.vectors, starts, matrices, tol=tol, max_iter=max_iter)
        result = PowerIteration(found[0], vectors, *found[1:])
        if keys is None:
            self.eigenvalues.copy_(result.eigenvalues)
        else:
            start = 0
            for key in names:
                value = self.eigenvalue(key)
                value.copy_(result.eigenvalues[start : start + value.numel()].view_as(value))
                start += value.numel()
        return result

    def _vector_starts(self, key: str) -> range:
        """Where in `vectors` the eigenvector of each block of `key` begins."""
        start = self._slots[key][1]
        groups, n = _groups_and_n(self.sizes[key])
        return range(start, start + groups * n, n)

    def damped_inverse(
        self,
        damping: float,
        keys: Sequence[str] | None = None,
        *,
        pi: Sequence[tuple[str, str]] | None = None,
        invert: Callable[..., tuple[list[Tensor], Tensor]] = damped_inverse_ex,
    ) -> tuple[FactorSet, Tensor]:
        """A FactorSet of (M + damping I)^-1 for the factors named (default: all), and the info of each block.

        It does not wait for the device: on a GPU a block whose info is not 0 stays NaN, as from
        `kfac_ext.damped_inverse_ex`. The inverses' own eigenvectors are zero until they are iterated.

        Args:
            damping: lambda, added to every diagonal; with `pi` the amounts of `kfac_ext.damped_inverse`.
            keys: which factors; default all.
            pi: pairs (key of A, key of G) whose damping is pi-corrected, each group's A with its G.
            invert: what is called instead of `kfac_ext.damped_inverse_ex`.

        Raises:
            ValueError: the factors of a pair have not the same number of groups.
        """
        names = list(self.sizes if keys is None else keys)
        sizes = {key: self.sizes[key] for key in names}
        result = FactorSet._without_starts(sizes, self.buffer.dtype, self.buffer.device)
        pairs = None if pi is None else self._block_pairs(names, pi)
        blocks = [block for key in names for block in _blocks(self[key], 3)]
        inverses, info = invert(blocks, damping, pi=pairs)
        targets = [block for key in names for block in _blocks(result[key], 3)]
        if targets:
            torch._foreach_copy_(targets, inverses)
        return result, info

    def _block_pairs(self, names: Sequence[str], pi: Sequence[tuple[str, str]]) -> list[tuple[int, int]]:
        """Pairs of factors as pairs of their blocks, counted over all factors named."""
        starts, end = {}, 0
        for key in names:
            starts[key] = end
            end += _groups_and_n(self.sizes[key])[0]
        pairs = []
        for a, g in pi:
            groups, others = (_groups_and_n(self.sizes[key])[0] for key in (a, g))
            if groups != others:
                raise ValueError(f"FactorSet.damped_inverse: pi pairs {a!r} of {groups} groups with {g!r} of {others}")
            pairs += [(starts[a] + i, starts[g] + i) for i in range(groups)]
        return pairs

    def narrowed(self, keep: Mapping[str, Tensor], groups: Mapping[str, Tensor] | None = None) -> FactorSet:
        """A new FactorSet in which the factors named keep only these rows and columns; the rest is copied.

        Args:
            keep: key -> indices [m] of the rows (= columns) that stay, in their new order; [groups, m] for a factor
                of one block a group that keeps other rows in each block.
            groups: key -> indices of the groups that stay, for factors of one block a group.

        The eigenvectors are cut and scaled back to length one; eigenvalues are kept until the next power iteration.
        """
        groups = groups or {}
        unknown = sorted((set(keep) | set(groups)) - set(self.sizes))
        if unknown:
            raise KeyError(f"FactorSet.narrowed: no factor named {unknown[0]!r}")
        matrices, vectors, values = {}, {}, {}
        for key in self.sizes:
            matrix, vector, value = self[key], self.vector(key), self.eigenvalue(key)
            if key in groups:
                matrix, vector, value = (t.index_select(0, groups[key]) for t in (matrix, vector, value))
            if key in keep:
                matrix = _columns(_rows(matrix, keep[key]), keep[key])
                vector = torch.nn.functional.normalize(_rows(vector[..., None], keep[key])[..., 0], dim=-1)
            matrices[key], vectors[key], values[key] = matrix, vector, value
        result = FactorSet(
            {key: _size_of(matrix) for key, matrix in matrices.items()},
            dtype=self.buffer.dtype,
            device=self.buffer.device,
        )
        for key, vector in vectors.items():
            result[key].copy_(matrices[key])
            result.eigenvalue(key).copy_(values[key])
            start = result.vector(key)  # stays where nothing of the eigenvector is left
            start.copy_(torch.where(vector.any(dim=-1, keepdim=True), vector, start))
        return result

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and the index, loadable with `torch.load(weights_only=True)`."""
        return {
            "sizes": dict(self.sizes),
            "buffer": self.buffer.clone(),
            "vectors": self.vectors.clone(),
            "eigenvalues": self.eigenvalues.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over factors and eigenpairs of a set with the same keys and sizes, in any order, of any dtype.

        Raises:
            ValueError: naming the first factor that differs; nothing is changed then.
        """
        sizes = {key: tuple(size) if isinstance(size, (list, tuple)) else size for key, size in state["sizes"].items()}
        for key in [*self.sizes, *sizes]:
            if sizes.get(key) != self.sizes.get(key):
                raise ValueError(
                    f"FactorSet.load_state_dict: factor {key!r} has size {sizes.get(key)} in the state, "
                    f"expected {self.sizes.get(key)}"
                )
        other = FactorSet(sizes, dtype=state["buffer"].dtype, device=self.buffer.device)
        for name in ("buffer", "vectors", "eigenvalues"):
            getattr(other, name).copy_(state[name])
        for key in self.sizes:  # slot by slot: the order of the keys decides where a slot lies
            self[key].copy_(other[key])
            self.vector(key).copy_(other.vector(key))
            self.eigenvalue(key).copy_(other.eigenvalue(key))


def _checked_size(key: str, size: Size) -> Size:
    numbers = size if isinstance(size, tuple) else (1, size)
    if len(numbers) != 2 or not all(isinstance(number, int) and number >= 1 for number in numbers):
        raise ValueError(f"FactorSet: factor {key!r} has size {size}, expected n >= 1 or (groups >= 1, n >= 1)")
    return size


def entries(size: Size) -> int:
    """How many numbers a factor of this size holds."""
    groups, n = _groups_and_n(size)
    return groups * n * n


def _groups_and_n(size: Size) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (1, size)


def _size_of(matrix: Tensor) -> Size:
    return (matrix.shape[0], matrix.shape[1]) if matrix.dim() == 3 else matrix.shape[0]


def _rows(matrix: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [m] of a matrix [..., n, k], or rows index[g] of the block g of [groups, n, k]."""
    if index.dim() == 1:
        return matrix.index_select(-2, index)
    return matrix.gather(-2, index[..., None].expand(-1, -1, matrix.shape[-1]))


def _columns(matrix: Tensor, index: Tensor) -> Tensor:
    """Columns `index` likewise."""
    if index.dim() == 1:
        return matrix.index_select(-1, index)
    return matrix.gather(-1, index[:, None].expand(-1, matrix.shape[-2], -1))


def _blocks(tensor: Tensor, grouped_dim: int) -> Sequence[Tensor]:
    return tensor.unbind(0) if tensor.dim() == grouped_dim else (tensor,)
