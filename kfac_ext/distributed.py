"""The processes that train one model together, and what they tell each other.

Imported only where a process group is initialised. W ranks that share a batch do what one process does with all of it;
for that they average what each has measured on its part, and take rank 0's word where rounding could tell them apart.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfac_ext.ops.inverse import damped_inverse_ex
from kfac_ext.triangles import pack_, packed_size, unpacked

WORTH_SHARING = 2e8  # operations, of matrices the sum of n^3: some ten milliseconds of a CPU
_LISTED = 300  # characters of what ranks hold


class RanksError(RuntimeError):
    """Ranks that should be alike differ, or one of them did not come."""


class LostRankError(RanksError):
    """A rank did not come, or has gone."""


class OtherRankError(ValueError):
    """What another rank has raised."""


@dataclass
class Traffic:
    """What one purpose has cost this rank.

    Attributes:
        calls: collective calls.
        bytes: of what this rank gave to them.
        seconds: that the host waited.
    """

    calls: int = 0
    bytes: int = 0
    seconds: float = 0.0


class Group:
    """Ranks that train one model.

    Every method but `own_rows` is a collective call: all ranks make it, in the same order.

    Args:
        process_group: of torch.distributed; None: all ranks there are.

    Attributes:
        rank, size: of this process in the group, and how many there are.
        traffic: purpose -> what it has cost.
        clock: gives a number that is to be equal on all ranks at every update of factors, which compare it.

    Example:
        >>> group = Group()
        >>> (mean,) = group.mean([torch.tensor(float(group.rank))], "example")
    """

    def __init__(self, process_group: Any = None) -> None:
        world: Any = dist.group.WORLD
        self.process_group = world if process_group is None else process_group
        self.size, self.rank = dist.get_world_size(self.process_group), dist.get_rank(self.process_group)
        self.traffic: dict[str, Traffic] = {}
        self.clock: Callable[[], int] = lambda: 0
        self._first = dist.get_global_rank(self.process_group, 0)
        devices = [part.partition(":")[0] for part in dist.get_backend_config(self.process_group).split(",")]
        self._devices = devices if "cpu" in devices else [devices[0]]

    # means

    def start_sum_(self, tensor: Tensor, purpose: str) -> Callable[[], None]:
        """Begin to replace `tensor` by its sum over ranks; call the result before looking at it."""
        with self._counted(purpose, tensor.nbytes):
            work = dist.all_reduce(tensor, group=self.process_group, async_op=True)
        assert work is not None

        def finish() -> None:
            with self._waiting(purpose):
                work.wait()

        return finish

    def start_mean(self, tensor: Tensor, purpose: str) -> Callable[[], Tensor]:
        """Begin a mean over ranks; the result gives it, once it is called."""
        total = self._carried(tensor.detach()).clone()
        finish = self.start_sum_(total, purpose)

        def mean() -> Tensor:
            finish()
            return (total / self.size).to(tensor.device)

        return mean

    def mean(self, tensors: Sequence[Tensor], purpose: str) -> list[Tensor]:
        """Means over ranks of tensors of one dtype and device, in one call; new tensors."""
        if not tensors:
            return []
        flat = self.start_mean(torch.cat([t.detach().flatten() for t in tensors]), purpose)()
        return [part.view(t.shape) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors)]

    def mean_of_symmetric(self, matrices: Sequence[Tensor], purpose: str) -> list[Tensor]:
        """Means over ranks of symmetric matrices [..., n, n] of one dtype and device, which travel as triangles."""
        if not matrices:
            return []
        sizes = [packed_size(matrix.shape) for matrix in matrices]
        flat = matrices[0].new_empty(sum(sizes))
        for part, matrix in zip(flat.split(sizes), matrices):
            pack_(part, matrix)
        (mean,) = self.mean([flat], purpose)
        return [unpacked(part, matrix.shape) for part, matrix in zip(mean.split(sizes), matrices)]

    # work that is shared

    def shares(self, costs: Sequence[float]) -> list[int] | None:
        """The owner of each item of work; None: it is so little that every rank had better do all of it."""
        return shared_work(costs, self.size) if sum(costs) >= WORTH_SHARING else None

    def gathered(
        self, owners: Sequence[int], own: Sequence[Tensor], sizes: Sequence[int], like: Tensor, purpose: str
    ) -> list[Tensor]:
        """What each rank has made of its items, on all: one tensor [size] an item.

        Args:
            owners: of the items.
            own: tensors of the items that this rank owns, in their order.
            sizes: numbers of each item.
            like: tells dtype and device.
            purpose: of the call.
        """
        of_rank = [[size for size, owner in zip(sizes, owners) if owner == rank] for rank in range(self.size)]
        mine = like.new_zeros((1, max(map(sum, of_rank))))
        if own:
            mine[0, : sum(of_rank[self.rank])] = torch.cat([part.flatten().to(like.dtype) for part in own])
        rows = self.rows_of_all(mine, purpose).unbind(0)
        parts = [iter(row[: sum(own_sizes)].split(own_sizes)) for row, own_sizes in zip(rows, of_rank)]
        return [next(parts[owner]) for owner in owners]

    # rank 0's word

    def first(self, value: Any, purpose: str) -> Any:
        """What rank 0 holds, for all; pickled, for small things."""
        box = [value if self.rank == 0 else None]
        with self._counted(purpose, 0), self._waiting(purpose):
            dist.broadcast_object_list(box, src=self._first, group=self.process_group, device=self._place)
        return box[0]

    def first_(self, tensors: Iterable[Tensor], purpose: str) -> None:
        """Put what rank 0 holds into these tensors, one call a dtype."""
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for alike in kinds.values():
            flat = self._carried(torch.cat([t.detach().flatten() for t in alike]))
            with self._counted(purpose, flat.nbytes), self._waiting(purpose):
                dist.broadcast(flat, src=self._first, group=self.process_group)
            with torch.no_grad():
                for part, tensor in zip(flat.split([t.numel() for t in alike]), alike):
                    tensor.copy_(part.view(tensor.shape))

    # what each holds

    def everyone(self, value: Any, purpose: str) -> list[Any]:
        """What each rank holds, in their order; pickled, for small things."""
        box: list[Any] = [None] * self.size
        with self._counted(purpose, 0), self._waiting(purpose):
            dist.all_gather_object(box, value, group=self.process_group)
        return box

    def any(self, flag: bool, purpose: str) -> bool:
        """Whether a rank says so."""
        said = torch.tensor([float(flag)], device=self._place)
        self.start_sum_(said, purpose)()
        return bool(said)

    def rows_of_all(self, tensor: Tensor, purpose: str) -> Tensor:
        """The rows [N, ...] of all ranks, one after the other: [W N, ...]."""
        mine = self._carried(tensor.detach()).contiguous()
        whole = mine.new_empty((self.size * len(mine), *mine.shape[1:]))
        with self._counted(purpose, mine.nbytes), self._waiting(purpose):
            dist.all_gather_into_tensor(whole, mine, group=self.process_group)
        return whole.to(tensor.device)

    def own_rows(self, whole: Tensor, dim: int) -> Tensor:
        """This rank's part of what is there for all ranks along `dim`."""
        return whole.chunk(self.size, dim)[self.rank]

    def require_same(self, what: dict[str, Any], who: str) -> None:
        """Raise RanksError on every rank, naming the first entry of `what` in which ranks differ."""
        found = self.everyone(what, "agreement")
        for name in what:
            values = [one.get(name) for one in found]
            if any(value != values[0] for value in values):
                listed = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
                shown = listed if len(listed) <= _LISTED else f"{listed[:_LISTED]}..."
                raise RanksError(f"{who}: ranks differ in {name}: {shown}")

    @contextmanager
    def raising_together(self) -> Iterator[None]:
        """What one rank raises inside, all raise at the end; inside there are no collective calls, or equal ones.

        Raises:
            OtherRankError: on the ranks that raised nothing themselves, naming the rank and what it said.
        """
        error: Exception | None = None
        try:
            yield
        except RanksError:  # known to all already
            raise
        except Exception as found:
            error = found
        said = self.everyone(None if error is None else str(error) or type(error).__name__, "agreement")
        if error is not None:
            raise error
        for rank, text in enumerate(said):
            if text is not None:
                raise OtherRankError(f"rank {rank}: {text}")

    # inside

    @property
    def _place(self) -> torch.device:
        """Where small tensors are made."""
        kind = self._devices[0] if "cpu" not in self._devices else "cpu"
        return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.cuda.current_device())

    def _carried(self, tensor: Tensor) -> Tensor:
        """The tensor where the group can carry it."""
        return tensor if tensor.device.type in self._devices else tensor.to(self._place)

    @contextmanager
    def _counted(self, purpose: str, size: int) -> Iterator[None]:
        entry = self.traffic.setdefault(purpose, Traffic())
        entry.calls += 1
        entry.bytes += size
        yield

    @contextmanager
    def _waiting(self, purpose: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            seconds = time.perf_counter() - begun
            raise LostRankError(
                f"rank {self.rank} of {self.size} waited {seconds:.0f} s for the others ({purpose}): {reason}"
            ) from error
        finally:
            self.traffic[purpose].seconds += time.perf_counter() - begun


def shared_damped_inverse(
    group: Group,
    matrices: Sequence[Tensor],
    damping: float | Sequence[Any],
    *,
    pi: Sequence[tuple[int, int]] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """As `kfac_ext.damped_inverse_ex` of matrices that all ranks have: each inverts some, by n^3, and all get all.

    The inverses travel as triangles, in one call.
    """
    paired = {place for pair in pi or () for place in pair}
    items = [*(pi or ()), *((place,) for place in range(len(matrices)) if place not in paired)]
    owners = group.shares([sum(float(len(matrices[place])) ** 3 for place in item) for item in items])
    if owners is None:
        return damped_inverse_ex(matrices, damping, pi=pi)
    mine = [place for item, owner in zip(items, owners) if owner == group.rank for place in item]
    amounts = damping if isinstance(damping, float) else [damping[place] for place in mine]
    number = {place: i for i, place in enumerate(mine)}
    pairs = None if pi is None else [(number[a], number[g]) for a, g in pi if a in number]
    inverses, info = damped_inverse_ex([matrices[place] for place in mine], amounts, pi=pairs)
    own = [_with_info(inverse, code) for inverse, code in zip(inverses, info)]
    places = [place for item in items for place in item]
    sizes = [packed_size(matrices[place].shape) + 1 for place in places]
    of_place = [owner for item, owner in zip(items, owners) for _ in item]
    parts = dict(zip(places, group.gathered(of_place, own, sizes, matrices[0], "inverses")))
    found = [unpacked(parts[place][:-1], matrix.shape) for place, matrix in enumerate(matrices)]
    return found, torch.stack([parts[place][-1] for place in range(len(matrices))]).to(torch.int32)


def _with_info(inverse: Tensor, info: Tensor) -> Tensor:
    packed = inverse.new_empty(packed_size(inverse.shape) + 1)
    pack_(packed[:-1], inverse)
    packed[-1] = info
    return packed


@contextmanager
def beside_static_graph(wrapper: nn.Module | None) -> Iterator[None]:
    """Inside, a partial backward of a loss is not taken for the first one of a DDP with `static_graph`.

    That one sums up all gradients when it ends, which it has not begun to find; DDP keeps in this place only whether it
    has been told to.
    """
    told = getattr(wrapper, "_static_graph_delay_allreduce_enqueued", None)
    if told is None:
        yield
        return
    wrapper._static_graph_delay_allreduce_enqueued = True  # type: ignore[union-attr, assignment]
    try:
        yield
    finally:
        wrapper._static_graph_delay_allreduce_enqueued = told  # type: ignore[union-attr, assignment]


def shared_work(costs: Sequence[float], size: int) -> list[int]:
    """The owner of each item: the most expensive first, each to the rank that has least to do (Graham 1969, LPT)."""
    loads, owners = [0.0] * size, [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        owners[item] = min(range(size), key=lambda rank: (loads[rank], rank))
        loads[owners[item]] += costs[item]
    return owners


def plain_and_group(model: nn.Module, process_group: Any, who: str) -> tuple[nn.Module, Group | None]:
    """The network itself, and the ranks that share its batches; None where each is alone, of which it warns.

    Args:
        model: a module, or a `DistributedDataParallel` of one.
        process_group: of the ranks, where the model does not tell it.
        who: asks; for errors.

    Raises:
        ValueError: the model is wrapped twice.
    """
    if isinstance(model, DistributedDataParallel):
        inner = model.module
        if isinstance(inner, (DistributedDataParallel, nn.DataParallel)):
            raise ValueError(f"{who}: model is a DistributedDataParallel of a {type(inner).__name__}, wrap it once")
        return inner, _several(process_group or model.process_group)
    if process_group is not None:
        return model, _several(process_group)
    if dist.get_world_size() > 1:
        warnings.warn(
            f"{who}: model is a plain {type(model).__name__} in a group of {dist.get_world_size()} ranks, each "
            "of which goes its own way; give the DistributedDataParallel, or process_group=",
            stacklevel=4,
        )
    return model, None


def _several(process_group: Any) -> Group | None:
    return Group(process_group) if dist.get_world_size(process_group) > 1 else None
