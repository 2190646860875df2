"""What a criterion is, and what it may look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from flatprune.coupling import CONSUMER, PRODUCER, Member, NeuronGroup
from flatprune.criteria.members import layers_of, member_rows
from flatprune.criteria.saliency import (
    InputStatistics,
    compensation,
    damped_inverses,
    factor_blocks,
    input_statistics,
    relative_damping,
)
from kfac_ext.curvature import Curvature
from kfac_ext.curvature.curvature import inverter
from kfac_ext.curvature.draws import Draws
from kfac_ext.curvature.probing import replaying
from kfac_ext.curvature.recent import Call
from kfac_ext.layers import Layer

Scores = list[Tensor]  # one tensor [neurons] a group
Inverses = dict[str, tuple[Tensor, ...]]


class ScoringContext:
    """What the neurons of a network can be judged by at one event; computed once, when it is first asked for.

    Args:
        model: the network.
        groups: its neuron groups.
        curvature: the model's running factors.
        seed: of everything that is drawn.
        step: optimizer steps taken; other steps draw other numbers.

    Attributes:
        generator: on the CPU, its state a function of seed and step, the same on all ranks.
        draws: of the same, for samples: of a batch that ranks share, each has those of its own.
        predictions: of the model for each recent call, once forwards have shown them; None before.
    """

    def __init__(
        self, model: nn.Module, groups: Sequence[NeuronGroup], curvature: Curvature, *, seed: int = 0, step: int = 0
    ) -> None:
        self.model, self.groups, self.curvature = model, groups, curvature
        self.generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
        self.draws = Draws(self.generator, curvature.group)
        self._statistics: dict[str, InputStatistics] = {}
        self._inverses: dict[str, Inverses] = {}
        self._output_inverses: Inverses | None = None
        self.predictions: list[Tensor] | None = None

    def statistics(self, role: str) -> InputStatistics:
        """A of every layer in which neurons are a "consumer" or "producer"; see `input_statistics`."""
        if role not in self._statistics:
            self._statistics[role] = input_statistics(self.curvature, self.layer_names(role))
            self.predictions = self._statistics[role].predictions
        return self._statistics[role]

    def inverses(self, role: str) -> Inverses:
        """H = (A + D)^-1 of the same layers."""
        if role not in self._inverses:
            self._inverses[role] = self.statistics(role).inverses()
        return self._inverses[role]

    def take_inverses(self, role: str) -> Inverses:
        """As `inverses`, for a caller who overwrites them: nothing of them, nor of what they are made of, is kept."""
        if role in self._inverses:
            del self._statistics[role]
            return self._inverses.pop(role)
        found = self.statistics(role).spent_inverses()
        del self._statistics[role]
        return found

    def gradient_factors(self, role: str) -> dict[str, tuple[Tensor, ...]]:
        """G of each group of the same layers."""
        factors = self.curvature.factors
        return {name: factor_blocks(factors[f"{name}.G"]) for name in self.layer_names(role)}

    def output_inverses(self) -> Inverses:
        """P = (G + D)^-1 of every producer, D = 0.01 mean(diag G)."""
        if self._output_inverses is None:
            self._output_inverses = damped_inverses(
                self.gradient_factors(PRODUCER),
                lambda _name, block: relative_damping(block),
                "the covariance of its gradients",
                inverter(self.curvature),
            )
        return self._output_inverses

    def layer_names(self, role: str) -> list[str]:
        """The layers with factors in which neurons of any group have a role, once each."""
        members = (member for group in self.groups for member in group.of_role(role))
        return list(dict.fromkeys(self.layers[member.names].name for member in members))

    @cached_property
    def layers(self) -> dict[tuple[str, ...], Layer]:
        """Names of a tensor -> the layer with factors whose weight it is."""
        return layers_of(self.curvature, self.groups)

    def tensor(self, member: Member) -> Tensor:
        """The tensor that a member owns entries of."""
        return self._tensors[member.name]

    def rows(self, member: Member) -> Tensor:
        """That tensor, detached, as a matrix [size, rest] whose rows the member's index counts."""
        return member_rows(self.tensor(member).detach(), member)

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        tensors = (self.model.named_parameters, self.model.named_buffers)
        return {name: t for named in tensors for name, t in named(remove_duplicate=False)}

    def gradient(self, parameter: Tensor, name: str) -> Tensor:
        """The gradient that the last backward of the training loop left.

        Raises:
            RuntimeError: there is none.
        """
        if not parameter.requires_grad:
            raise RuntimeError(f"{name} is frozen and has no gradient: exclude the layer, or take another criterion")
        if parameter.grad is None:
            raise RuntimeError(
                f"{name} has no gradient: score neurons (`Pruner.step`) between `backward` and `zero_grad`"
            )
        return parameter.grad

    def recent_calls(self) -> tuple[Call, ...]:
        """The model's last calls in training (256 samples or a batch more), each to be made again as it was.

        Raises:
            RuntimeError: there has been none.
        """
        if not self.curvature.recent_calls:
            raise RuntimeError("no inputs yet: the model must make a training forward before neurons can be scored")
        return self.curvature.recent_calls

    @contextmanager
    def probing(self) -> Iterator[None]:
        """Forwards inside disturb nothing: batch norms use batch statistics, dropout is off, factors stay."""
        with replaying(self.curvature):
            yield


def consumer_compensation(context: ScoringContext, pruned: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """The layers that read the neurons make up for them; see `flatprune.criteria.saliency.compensation`."""
    return compensation(context.curvature, context.layers, context.groups, pruned, context.inverses(CONSUMER))


NEEDS = ("factors", "inverses", "gradients", "forwards")
COMPENSATES = ("method", "always", "never")


class JointScores(Protocol):
    """Scores of the neurons that are left, given those that went.

    Attributes:
        scores: float64 [neurons] a group, on the CPU; those of pruned neurons mean nothing.
        total: the predicted change of the loss of everything that went.
    """

    total: float

    @property
    def scores(self) -> Sequence[Tensor]:
        """As they are now."""
        ...

    def remove(self, position: int, neurons: Sequence[int]) -> set[int]:
        """Let neurons of the group at `position` go; returns positions of the groups whose scores may have changed."""
        ...

    def change(self, neurons: Mapping[int, Sequence[int]]) -> float:
        """By how much `total` would rise if neurons of groups, by position, went together; nothing goes."""
        ...

    def compensated(self) -> dict[str, Tensor] | None:
        """New values of the survivors' tensors after what went; None: those that the criterion's compensation gives."""
        ...


@dataclass(frozen=True)
class Criterion:
    """A way to judge neurons: the higher the score, the longer a neuron stays.

    Attributes:
        name: as in `Pruner(criterion=...)`.
        score: from `ScoringContext` to one tensor [neurons] a group; its docstring has the formula.
        source: where it comes from.
        needs: of "factors" (A and G), "inverses" (of them), "gradients" (left by the last backward) and "forwards" (of
            its own, on recent inputs).
        role: "consumer" or "producer": the layers whose factors the score reads; groups are refused where one has none.
        per_cost: divide the score by what goes with the neuron, in the unit of the target: parameters, say.
        predicts_loss: the score is a change of the loss, so that sums of it can be held against measured changes.
        compensates: what `compensate="auto"` means: "method" (with convolutions, or for few parameters), "always" or
            "never".
        compensation: from context and the pruned neurons to new values of the survivors' tensors.
        uncompensated: the criterion that stands in where "auto" decides against compensation.
        joint: scores that take into account which neurons went before, for `selection="greedy"`.
        greedy: whether `selection="auto"` means greedy where survivors compensate in a network with convolutions.
        check: raises ValueError for groups of the context it cannot judge; factors may not have been measured yet.

    Raises:
        ValueError: `needs`, `role` or `compensates` is none of the above; `greedy` without `joint`.

    Example:
        >>> def activity(context):  # mean squared weight that reads each neuron
        ...     return [
        ...         sum(context.rows(m).square().mean(1)[m.index].sum(1) for m in group.of_role("consumer"))
        ...         for group in context.groups
        ...     ]
        >>> pruner = Pruner(..., criterion=Criterion("activity", activity, source="ours"))
    """

    name: str
    score: Callable[[ScoringContext], Scores]
    source: str = "given by the user"
    needs: tuple[str, ...] = ()
    role: str = CONSUMER
    per_cost: bool = False
    predicts_loss: bool = False
    compensates: str = "never"
    compensation: Callable[[ScoringContext, Mapping[int, Tensor]], dict[str, Tensor]] = consumer_compensation
    uncompensated: Criterion | None = None
    joint: Callable[[ScoringContext], JointScores] | None = None
    greedy: bool = False
    check: Callable[[ScoringContext], None] | None = None

    def __post_init__(self) -> None:
        choices = (
            *(("needs", need, NEEDS) for need in self.needs),
            ("role", self.role, (CONSUMER, PRODUCER)),
            ("compensates", self.compensates, COMPENSATES),
        )
        for argument, value, allowed in choices:
            if value not in allowed:
                raise ValueError(
                    f"Criterion {self.name}: {argument} is {value!r}, expected one of {', '.join(allowed)}"
                )
        if self.greedy and self.joint is None:
            raise ValueError(f"Criterion {self.name}: greedy is True, but there are no joint scores to choose by")

    def scores(self, context: ScoringContext) -> Scores:
        """The scores of every group, checked: float64 on the CPU; of ranks, each with its inputs, the mean.

        Raises:
            ValueError: naming criterion and group whose scores have another shape or are not finite.
        """
        found = self.score(context)
        if len(found) != len(context.groups):
            raise ValueError(f"criterion {self.name}: {len(found)} tensors of scores for {len(context.groups)} groups")
        checked = []
        for group, values in zip(context.groups, found):
            if values.shape != (group.width,):
                raise ValueError(
                    f"criterion {self.name}: scores of {group.name!r} have shape {tuple(values.shape)}, expected "
                    f"({group.width},)"
                )
            checked.append(values.detach().double().cpu())
        if context.curvature.group is not None:
            checked = context.curvature.group.mean(checked, "scores")
        self.refuse_not_finite(context, checked)
        return checked

    def refuse_not_finite(self, context: ScoringContext, scores: Sequence[Tensor]) -> None:
        """Raise ValueError naming the first group whose scores are not finite."""
        for group, values in zip(context.groups, scores):
            if not bool(values.isfinite().all()):
                raise ValueError(f"criterion {self.name}: scores of {group.name!r} are not finite")


def ranks(scores: Scores) -> Scores:
    """Rank within the group as a fraction in (0, 1], so that all groups lose alike: a *uniform* criterion."""
    return [(score.argsort().argsort().double() + 1) / len(score) for score in scores]


def mean_over_producers(context: ScoringContext, group: NeuronGroup, per_row: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean over all rows that make a neuron, in all layers that produce it, of per_row(matrix [rows, d]) [rows].

    The rule for magnitudes of neurons coupled over several layers.
    """
    means = [
        per_row(context.rows(member)).cpu().double()[member.index].mean(dim=1) for member in group.of_role(PRODUCER)
    ]
    return torch.stack(means).mean(dim=0)
