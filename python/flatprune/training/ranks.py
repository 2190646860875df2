"""The processes that `torchrun` has started for one run: who leads, what they tell each other, what is saved of all.

Rank 0 does what one process does: it checks what was given, makes the folder, prints and writes. Every trainer that it
makes, and every training that it begins, it announces; the other ranks make the same trainer of the same settings and
state and train along (`follow`). What ends rank 0 ends all, and is said once.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from flatprune.data import Dataset
from flatprune.errors import DivergedError, InputError, Interrupted
from flatprune.settings import Settings

if TYPE_CHECKING:
    from kfac_ext.distributed import Group

_ERRORS: dict[str, type[Exception]] = {kind.__name__: kind for kind in (InputError, DivergedError, Interrupted)}
_T = TypeVar("_T")
_OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
_SEED_STEP = 1_000_003  # between the seeds of ranks


class StepFlags:
    """What every rank says at the end of a step, and hears a step later, so that no step waits for it.

    Args:
        group: the ranks.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._under_way: tuple[Tensor, Callable[[], None]] | None = None

    def exchange(self, stop: bool, loss: float) -> tuple[bool, float]:
        """Say whether to stop, and the loss; what all said at the step before: whether one wants to, the mean loss."""
        heard = self.hear()
        said = torch.tensor([float(stop), loss], dtype=torch.float64)
        self._under_way = (said, self._group.start_sum_(said, "flags of steps"))
        return heard

    def hear(self) -> tuple[bool, float]:
        """What was said last, once; False and 0 if nothing was."""
        if self._under_way is None:
            return False, 0.0
        (said, finish), self._under_way = self._under_way, None
        finish()
        stop, loss = said.tolist()
        return stop > 0, loss / self._group.size


class TrainingRanks:
    """The ranks of one run, seen from one of them.

    Args:
        group: all of them.
        local_rank: of this one on its machine.
    """

    def __init__(self, group: Group, local_rank: int) -> None:
        self.group, self.local_rank = group, local_rank
        self.trainers = 0  # made so far
        self.are_apart = False  # might the others be waiting for something else than a task?

    @property
    def leads(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.group.rank == 0

    # what rank 0 announces

    def announce(self, task: str, *content: Any) -> None:
        """Tell the others what comes next, where this rank leads."""
        if self.leads:
            self.group.first((task, content), "tasks")

    def next_task(self) -> tuple[str, tuple[Any, ...]]:
        """What rank 0 has announced."""
        return self.group.first(None, "tasks")

    def lead(self, work: Callable[[], _T]) -> _T:
        """Do the work of rank 0; its result, or what has ended it, is told to the others."""
        from kfac_ext.distributed import RanksError

        try:
            result = work()
        except RanksError as error:  # known to all, or there is nobody to tell
            raise InputError(str(error)) from error
        except BaseException as error:
            if not self.are_apart:
                kind = type(error).__name__ if type(error).__name__ in _ERRORS else InputError.__name__
                self.announce("end", kind, str(error) or type(error).__name__)
            raise
        self.announce("end", "", result)
        return result

    @contextmanager
    def together(self) -> Iterator[None]:
        """What raises on one rank inside, raises on all: as it is there, and as InputError on the others."""
        from kfac_ext.distributed import OtherRankError

        try:
            with self.group.raising_together():
                yield
        except OtherRankError as error:
            raise InputError(str(error)) from error

    # what a trainer asks of them

    def begin(self, settings: Settings, state: dict[str, Any] | None, load: Callable[[], Dataset]) -> Dataset:
        """Have all ranks make a trainer; the data, once all have read the same.

        Raises:
            InputError: one of them cannot read the data, or has others.
        """
        from kfac_ext.distributed import RanksError

        self.announce("make", settings.as_dict(), state)
        with self.together():
            dataset = load()
        try:
            self.group.require_same({"data": dataset.digest}, "flatprune run")
        except RanksError as error:
            raise InputError(str(error)) from error
        self.trainers += 1
        return dataset

    @contextmanager
    def training(self, number: int) -> Iterator[None]:
        """While all ranks train the trainer of this number."""
        self.announce("train", number)
        self.are_apart = True
        try:
            yield
        except tuple(_ERRORS.values()):
            self.are_apart = False  # all have come to the same end
            raise
        self.are_apart = False

    def settings(self, settings: Settings) -> Settings:
        """The settings with this rank's own device."""
        return settings.changed(device=f"cuda:{self.local_rank}") if settings.device.startswith("cuda") else settings

    def seed_streams(self, seed: int) -> None:
        """Other masks of dropout on other ranks; those of rank 0 are one process's."""
        if self.group.rank > 0:
            torch.manual_seed(seed + _SEED_STEP * self.group.rank)

    def wrapped(self, model: nn.Module, device: torch.device, *, shared_norms: bool) -> nn.Module:
        """The DDP of a network; `shared_norms`: whose batch norms are to see the whole batch.

        Raises:
            InputError: such batch norms need a GPU.
        """
        if shared_norms:
            if device.type != "cuda":
                raise InputError("sync_batch_norm: torch's SyncBatchNorm runs on GPUs only, and device is cpu")
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        ids = [device] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids)

    def own_part(self, tensor: Tensor) -> Tensor:
        """This rank's rows of the whole batch's."""
        return self.group.own_rows(tensor, 0)

    def sums(self, values: list[float], purpose: str) -> list[float]:
        """Sums over ranks of numbers, in float64."""
        total = torch.tensor(values, dtype=torch.float64)
        self.group.start_sum_(total, purpose)()
        return total.tolist()

    def traffic(self, others: Iterable[Group | None]) -> dict[str, dict[str, float]]:
        """Purpose -> calls, bytes that this rank gave and seconds that it waited, over this group and others."""
        found: dict[str, dict[str, float]] = {}
        for group in (self.group, *others):
            for purpose, entry in {} if group is None else group.traffic.items():
                total = found.setdefault(purpose, {"calls": 0, "bytes": 0, "seconds": 0.0})
                total["calls"] += entry.calls
                total["bytes"] += entry.bytes
                total["seconds"] += entry.seconds
        return dict(sorted(found.items(), key=lambda item: -item[1]["bytes"]))

    # checkpoints

    def whole_calls(self, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The recent calls of the whole batches, from those of all ranks; batches have tensors alone."""
        of_ranks = self.group.everyone([[arg.cpu() for arg in call["args"]] for call in calls], "checkpoint")
        samples = [call["samples"] * self.group.size for call in calls]
        batches = [[torch.cat(parts) for parts in zip(*of_batch)] for of_batch in zip(*of_ranks)]
        return [{"args": args, "kwargs": {}, "samples": count} for args, count in zip(batches, samples)]

    def whole_sums(self, sums: dict[str, Any]) -> dict[str, Any]:
        """The sums of the running epoch over all ranks."""
        totals = self.sums([float(value) for value in sums.values()], "checkpoint")
        return {name: type(value)(total) for (name, value), total in zip(sums.items(), totals)}

    def all_streams(self, streams: dict[str, Any]) -> dict[str, Any]:
        """The random streams, with those of all ranks."""
        own = {name: streams[name] for name in ("torch", "cuda")}
        return {**streams, "ranks": self.group.everyone(own, "checkpoint")}

    def own_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """What this rank goes on from, of a checkpoint of all; says if that was of another number of ranks."""
        curvature = {**state["curvature"], "recent_calls": self.own_calls(state["curvature"]["recent_calls"])}
        state = {**state, "curvature": curvature}
        if not self.leads:
            state["progress"] = {**state["progress"], "loss_sum": 0.0, "correct": 0, "seen": 0}
        streams = state["rng"].get("ranks") or [state["rng"]]
        if len(streams) == self.group.size:
            state["rng"] = {**state["rng"], **streams[self.group.rank]}
        elif self.leads:
            warn_of_other_number(len(streams), self.group.size)
        return state

    def own_calls(self, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The inverse of `whole_calls`."""
        size = self.group.size
        return [
            {**call, "args": [self.own_part(arg) for arg in call["args"]], "samples": call["samples"] // size}
            for call in calls
        ]


def warn_of_other_number(before: int, now: int) -> None:
    """Say what going on with another number of ranks means."""
    warnings.warn(
        f"the checkpoint is of {before} ranks, and there are {now}: the run goes on with the same batches, but sums "
        "are made in another order and dropout draws other masks",
        stacklevel=4,
    )


# Threads of gloo need Python's lock to let go of a collective's tensors, and abort the process if they ask for it as it
# ends. They are given time; PyTorch does not end these threads where there was a DDP module.
_LETTING_GO = 0.1

_current: TrainingRanks | None = None


def current_ranks() -> TrainingRanks | None:
    """The ranks that this process has joined for the run in hand; None: it is alone."""
    return _current


@contextmanager
def joined(device: str, timeout: float | None = None) -> Iterator[TrainingRanks | None]:
    """The processes that torchrun has started, joined for a run; None where there is only this one.

    NCCL on cuda:LOCAL_RANK for tensors on GPUs, gloo for those on the host. A group that the caller has initialised is
    taken as it is.

    Args:
        device: as in the settings.
        timeout: seconds to wait for a rank that does not come, now or later; None: torch's own, half an hour.

    Raises:
        InputError: what torchrun sets is not all there, there is no GPU for this rank, or a rank did not come.
    """
    global _current
    import torch.distributed as dist

    is_there = dist.is_available() and dist.is_initialized()
    if _current is not None or (not is_there and _number("WORLD_SIZE", "1") < 2):
        yield _current
        return
    if not is_there:
        _initialise(device, timeout)
    from kfac_ext.distributed import Group

    group = Group()
    if group.size < 2:
        yield None
        return
    _current = TrainingRanks(group, _number("LOCAL_RANK", str(group.rank)))
    try:
        yield _current
    finally:
        _current = None
        if not is_there:
            dist.destroy_process_group()
            time.sleep(_LETTING_GO)


def _initialise(device: str, timeout: float | None) -> None:
    import torch.distributed as dist

    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but not set: {', '.join(missing)}; several processes are "
            "started by torchrun"
        )
    rank, size = _number("RANK", "0"), _number("WORLD_SIZE", "1")
    backend = "gloo"
    if device.startswith("cuda"):
        local = _number("LOCAL_RANK", str(rank))
        if local >= torch.cuda.device_count():
            raise InputError(f"rank {rank} wants cuda:{local}, but there are {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    limits: dict[str, Any] = {} if timeout is None else {"timeout": timedelta(seconds=timeout)}
    try:
        # torchrun's store outlives a restart, and with it the addresses of processes that are gone
        store, rank, size = next(dist.rendezvous("env://", rank, size, **limits))
        store = dist.PrefixStore(f"flatprune/{launch()[1]}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, **limits)
    except (RuntimeError, ValueError) as error:
        waited = "half an hour" if timeout is None else f"{timeout:g} s"
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"rank {rank} of {size}: the others did not come in {waited} ({reason})") from error


def _number(name: str, default: str) -> int:
    text = os.environ.get(name, default)
    if not text.isdigit():
        raise InputError(f"{name} is {text!r}, expected a whole number as torchrun sets it")
    return int(text)


def launch() -> tuple[str | None, int]:
    """Which start by torchrun this is, and how often it has been restarted since."""
    return os.environ.get("TORCHELASTIC_RUN_ID"), _number("TORCHELASTIC_RESTART_COUNT", "0")


def is_follower() -> bool:
    """Whether torchrun has started this process and it is not the one that prints."""
    return _number("WORLD_SIZE", "1") > 1 and _number("RANK", "0") > 0


def alone(environment: dict[str, str]) -> dict[str, str]:
    """The environment without what torchrun sets, for a process that is to be no rank."""
    return {name: value for name, value in environment.items() if not name.startswith(_OF_TORCHRUN)}


def follow(
    ranks: TrainingRanks,
    make: Callable[[Settings, dict[str, Any] | None, Sequence[Any]], Any],
    train: Callable[[Any], None],
) -> Any:
    """Do what rank 0 announces until it ends; its result.

    Args:
        ranks: of which this is not the first.
        make: a trainer of settings, state and the trainers made before.
        train: trains one; what it raises, rank 0 raises too.

    Raises:
        InputError, DivergedError, Interrupted: as rank 0 does; it `is_said` by that then.
    """
    from kfac_ext.distributed import LostRankError, RanksError

    trainers: list[Any] = []
    try:
        while True:
            task, content = ranks.next_task()
            if task == "end":
                kind, result = content
                if kind:
                    raise _said(_ERRORS[kind](result))
                return result
            with suppress(*_ERRORS.values()):  # rank 0 has the same, and will tell it
                if task == "make":
                    settings, state = content
                    trainers.append(make(Settings.from_dict(settings), state, trainers))
                elif task == "state":
                    trainers[content[0]].state()
                else:
                    train(trainers[content[0]])
    except LostRankError as error:
        raise InputError(str(error)) from error
    except RanksError as error:  # raised on all ranks
        raise _said(InputError(str(error))) from error


def _said(error: Exception) -> Exception:
    """Mark what another rank says to the user."""
    error.is_said = True  # type: ignore[attr-defined]
    return error
