"""Ranks that prune together: alike before an event, rank 0's choice at it, a DDP that fits after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from flatprune.cutting.ema_models import named_tensors
from flatprune.distributed import (
    agree_on_buffers,
    checksum,
    refuse_sharded,
    refuse_unrenewable,
    refuse_wrapped,
    renew,
)
from flatprune.pruning.costs import CostTracker
from flatprune.pruning.limits import LossBudget
from flatprune.pruning.selection import Choice
from kfac_ext.curvature import Curvature

if TYPE_CHECKING:
    from kfac_ext.distributed import Group


class PruningRanks:
    """What the ranks of a pruner tell each other; every method is called on all of them.

    Inputs of scores and weights are equal on all ranks bit for bit. What is computed from them may differ in the last
    bit where ranks have different numbers of threads, so what decides, or is put into the network, is rank 0's.

    Args:
        model: the network.
        wrapper: the DDP of it, which is renewed after a cut, or None.
        group: the ranks.
    """

    def __init__(self, model: nn.Module, wrapper: nn.Module | None, group: Group) -> None:
        self.model, self.wrapper, self.group = model, wrapper, group

    def begin(self, tracker: CostTracker, agreement: Mapping[str, Any], clock: Callable[[], int]) -> None:
        """Make sure that ranks begin alike, and have rank 0's table of latencies; `clock` counts their steps.

        Trial cuts have taken the network into float64 and back, which the reducer of a DDP does not survive.

        Raises:
            RanksError: on every rank, naming in what they differ.
        """
        self._require_alike(agreement)
        self.share_latency(tracker)
        self.group.clock = clock
        self.renew()

    def hear(self, curvature: Curvature) -> None:
        """Wait for an update that is on its way since the forward, which tells of ranks that have gone apart.

        Raises:
            RanksError: on every rank.
        """
        _ = curvature.updated_layers

    def prepare(self, agreement: Mapping[str, Any]) -> None:
        """Before an event: make sure that ranks are alike, and have equal buffers.

        Raises:
            RanksError: on every rank, naming in what they differ; nothing is changed then.
        """
        self._require_alike(agreement)
        agree_on_buffers(self.model, self.group)

    def share_latency(self, tracker: CostTracker) -> None:
        """Take rank 0's measurements of latency, if there are any."""
        state = tracker.state_dict()
        if state is not None:
            tracker.load_state_dict(self.group.first(state, "latency"))

    def choice(self, choice: Choice, losses: LossBudget) -> Choice:
        """Rank 0's choice, and what it makes of the budget of predicted losses."""
        told = (choice._replace(joint=None), losses.spent, losses.exceeded)
        first, losses.spent, losses.exceeded = self.group.first(told, "choice")
        return first._replace(joint=choice.joint)

    def replacements(self, values: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
        """Rank 0's weights of the survivors."""
        names = self.group.first(None if values is None else list(values), "choice")
        if names is None:
            return None
        tensors = named_tensors(self.model)
        own = {name: (values or {}).get(name, tensors[name]).detach().clone() for name in names}
        self.group.first_(own.values(), "compensated weights")
        return own

    def renew(self) -> None:
        """Have a DDP that fits the parameters again."""
        if self.wrapper is not None:
            renew(self.wrapper)  # type: ignore[arg-type]

    def _require_alike(self, agreement: Mapping[str, Any]) -> None:
        self.group.require_same({**agreement, "weights": checksum(self.model)}, "Pruner")


def ranks_of(model: nn.Module, curvature: Curvature) -> PruningRanks | None:
    """The ranks that the curvature shares its batches with; None: one process.

    Raises:
        ValueError: only one of pruner and curvature was given the DDP, or it cannot be renewed; the model is a
            DataParallel, or sharded.
    """
    refuse_sharded(model, "Pruner")
    wrapper = model if isinstance(model, nn.parallel.DistributedDataParallel) else None
    if wrapper is not None and curvature.wrapper is not model:
        raise ValueError("Pruner: model is a DistributedDataParallel, give the same one to Curvature")
    if wrapper is None and curvature.wrapper is not None and model is curvature.model:
        raise ValueError(
            "Pruner: the curvature has the DistributedDataParallel of this model; give it to the pruner too, so that "
            "it can be renewed after a cut"
        )
    if wrapper is not None:
        refuse_unrenewable(wrapper)
    else:
        refuse_wrapped(model, "Pruner")
    if curvature.group is not None:
        return PruningRanks(curvature.model, curvature.wrapper, curvature.group)
    if wrapper is None:
        return None
    from kfac_ext.distributed import Group

    return PruningRanks(curvature.model, wrapper, Group(wrapper.process_group))  # of one rank, but a DDP all the same
