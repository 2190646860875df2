"""Curvature, flatness term and pruner of a training loop in one object."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from flatprune.criteria import Criterion, Scores, ScoringContext
from flatprune.flatness.spectrum import STRENGTH, Flatness
from flatprune.pruning.learning_rate import PruningLR
from flatprune.pruning.pruner import Pruner
from flatprune.pruning.removals import Removal
from flatprune.pruning.scalars import Logger, event_scalars, state_scalars
from flatprune.pruning.schedule import CubicSchedule
from flatprune.pruning.targets import UNITS, Target, amount
from kfac_ext.curvature import Curvature
from kfac_ext.curvature.outputs import Pick

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger("flatprune")


class PrunerArguments(TypedDict, total=False):
    """The arguments of `Pruner` that `PruneWhileTraining` hands on, so that type checkers know them."""

    criterion: str | Criterion | Callable[[ScoringContext], Scores]
    compensate: str | bool
    selection: str
    seed: int
    schedule: CubicSchedule | None
    round_to: int
    min_width: int
    max_layer_fraction: float
    tie_widths: bool | Sequence[str]
    keep_proportions: str | bool
    max_predicted_loss: float | None
    measure: bool
    exclude: Sequence[str | type]
    layers: Sequence[str] | None
    forward: Callable[..., Any] | None
    ema_models: Sequence[nn.Module]
    output: Pick


class PruneWhileTraining:
    """Prunes a network in the loop that trains it, and drives it toward a flat minimum.

    It makes a `Curvature`, a `Flatness` and a `Pruner` of the network, has them act at the right moments, and tells the
    logger "flatprune" of each event in one line. The parameters stay the same objects; so does the optimizer.

    Args:
        model: the network, in training mode.
        optimizer: as for `Pruner`.
        example_inputs: what the model can be called with, one or two samples; as for `Pruner`.
        target: a `Target`, or the fraction of the parameters that shall be left.
        total_steps: optimizer steps of the whole training.
        flatness: True: the flatness term with its defaults; False: none; a number: its strength; a dict: arguments of
            `Flatness`.
        accumulate: calls of `loss` for each step of the optimizer, where gradients of several batches are added up.
        lr_schedule: None: learning rates are the loop's own business; "flat_cosine" and others: those of `PruningLR`.
        lr_warmup: with an `lr_schedule`, the fraction of the training in which the rate rises linearly to its peak.
        lr_growth: with an `lr_schedule`, the rate is multiplied by (parameters at first / now)^lr_growth; Adam wants
            0.5, see `flatprune.pruning.learning_rate.growth_factor`.
        curvature: arguments of `Curvature`, such as {"loss": "mse"}, or a Curvature of this model.
        logger: told at the first step and at each event what `scalars` gives, with the neurons that went and the
            predicted and measured change of the loss (`flatprune.pruning.scalars.event_scalars`), such as a
            `flatprune.integrations.loggers.TensorBoardLogger`. It is yours to close.
        pruner_arguments: more arguments of `Pruner`, such as `criterion`, `exclude`, `forward` or `schedule`.

    Attributes:
        curvature, flatness, pruner, lr_scheduler: the parts; `flatness` and `lr_scheduler` may be None.

    Raises:
        TypeError, ValueError, KeyError: from the parts, naming the argument; nothing holds on to the model then.

    Example:
        >>> pruning = flatprune.PruneWhileTraining(model, optimizer, x[:2], target=0.1, total_steps=1000)
        >>> for x, y in loader:
        ...     outputs = model(x)
        ...     loss = pruning.loss(x, outputs, criterion(outputs, y))
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        ...     pruning.step()
        >>> print(pruning.summary())
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        example_inputs: Any,
        *,
        target: Target | float,
        total_steps: int,
        flatness: bool | float | Mapping[str, Any] = True,
        accumulate: int = 1,
        lr_schedule: str | None = None,
        lr_warmup: float = 0.0,
        lr_growth: float = 0.0,
        curvature: Curvature | Mapping[str, Any] | None = None,
        logger: Logger | None = None,
        **pruner_arguments: Unpack[PrunerArguments],
    ) -> None:
        if not isinstance(target, Target):
            target = Target(params=target)
        if logger is not None and not callable(getattr(logger, "log", None)):
            raise TypeError(f"PruneWhileTraining: logger is {logger!r}, expected one with a method log(step, scalars)")
        schedule = pruner_arguments["schedule"] = pruner_arguments.get("schedule") or CubicSchedule(total_steps)
        given = isinstance(curvature, Curvature)
        self.curvature = curvature if isinstance(curvature, Curvature) else Curvature(model, **(curvature or {}))
        try:
            self.flatness = _flatness(self.curvature, total_steps * accumulate, flatness)
            self.lr_scheduler = _lr_scheduler(optimizer, total_steps, lr_schedule, lr_warmup, lr_growth, schedule)
            self.pruner = Pruner(
                model,
                optimizer,
                self.curvature,
                example_inputs,
                target=target,
                total_steps=total_steps,
                **pruner_arguments,
            )
        except Exception:
            if not given:
                self.curvature.remove()
            raise
        self._logger, self._has_told = logger, False

    def loss(self, inputs: Any, outputs: Any, loss: Tensor) -> Tensor:
        """The loss to call `backward()` on: `loss` plus the flatness term of this batch.

        Call it once a forward; under gradient accumulation for every part, with the part's mean loss.

        Args:
            inputs: what the model was given: a tensor, a tuple of its positional inputs, or a dict of keywords.
            outputs: what it returned, or of that what the loss is of.
            loss: the mean loss of these, 0-d, with its graph.
        """
        return loss + self.penalty(inputs, outputs, loss)

    def penalty(self, inputs: Any, outputs: Any, loss: Tensor) -> Tensor:
        """The flatness term alone, 0-d, of the same arguments: for losses that are scaled before they are added to."""
        if self.flatness is None:
            return loss.new_zeros(())
        prediction = outputs if isinstance(outputs, Tensor) else self.curvature.reading.read(outputs)
        return self.flatness.penalty(inputs, prediction, loss)

    def step(self) -> list[Removal]:
        """Count a step of the optimizer; at an event of the schedule neurons go. Call it after `optimizer.step()`.

        Returns:
            What `Pruner.step` does.

        Raises:
            ValueError, RuntimeError: from `Pruner.step`; all is as before then.
        """
        if self._logger is not None and not self._has_told:
            self._logger.log(self.pruner.step_count, self.scalars())
            self._has_told = True
        removals = self.pruner.step()
        if removals:
            logger.info(self._line(removals))
        if removals and self._logger is not None:
            self._logger.log(self.pruner.step_count, {**self.scalars(), **event_scalars(removals)})
        if self.lr_scheduler is not None:
            with warnings.catch_warnings():  # a GradScaler may have left out the first step
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
                self.lr_scheduler.step()
        return removals

    @property
    def finished(self) -> bool:
        """Whether all neurons that go are gone."""
        return bool(self.pruner.stopped) or self.pruner.step_count >= self.pruner.schedule.events[-1]

    def scalars(self) -> dict[str, float]:
        """Parameters, multiply-accumulates, widths and spectral radius now, for a logger of one's own at any time.

        Their names says `flatprune.pruning.scalars.state_scalars`.
        """
        return state_scalars(self.pruner, self.curvature)

    def summary(self) -> str:
        """What became of the network so far: sizes, target, and the width of each group before and after."""
        pruner = self.pruner
        unit, goal = pruner.target.unit, pruner.goal
        lines = [
            f"{pruner.params:,} of {pruner.params_start:,} parameters ({pruner.params / pruner.params_start:.2%})",
            f"{amount(unit, pruner.cost)} {UNITS[unit]} of {amount(unit, pruner.cost_start)}, the target is "
            f"{amount(unit, goal)}: {pruner.cost / goal - 1:+.2%}" + ("" if self.finished else ", not done yet"),
        ]
        widths = pruner.widths()
        longest = max(len(name) for name in widths)
        for name, before in self.pruner.widths_start.items():
            lines.append(f"  {name:{longest}}  {before:5d} -> {widths[name]}")
        lines += [f"note: {record.note}" for record in pruner.history if record.note]
        return "\n".join(lines)

    def close(self) -> None:
        """Take all hooks off the model, which is then as any other; what was measured stays readable."""
        self.curvature.remove()

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers, for `torch.load(weights_only=True)`.

        To go on, `flatprune.take_tensors(model, tensors, attributes=state["attributes"])` makes the pruned network
        first, then come its optimizer and this object.
        """
        parts: dict[str, Any] = {"curvature": self.curvature, "pruner": self.pruner}
        parts |= {"flatness": self.flatness} if self.flatness is not None else {}
        parts |= {"lr_scheduler": self.lr_scheduler} if self.lr_scheduler is not None else {}
        state = {name: part.state_dict() for name, part in parts.items()}
        return {**state, "attributes": state["pruner"]["attributes"]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`, with the model as it was then and the same settings.

        Raises:
            ValueError: a part is in one of the two and not in the other, or differs; the message names it.
        """
        for name, own in (("flatness", self.flatness), ("lr_scheduler", self.lr_scheduler)):
            if (name in state) != (own is not None):
                here, there = ("in use", "not in the state") if own is not None else ("not in use", "in the state")
                raise ValueError(f"PruneWhileTraining.load_state_dict: {name} is {here}, but {there}")
        self.pruner.load_state_dict(state["pruner"])
        self.curvature.load_state_dict(state["curvature"])
        if self.flatness is not None:
            self.flatness.load_state_dict(state["flatness"])
        if self.lr_scheduler is not None:
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])

    def _line(self, removals: list[Removal]) -> str:
        pruner = self.pruner
        unit = pruner.target.unit
        lost = [f"{record.layer} -{record.removed}" for record in removals if record.removed]
        shown = ", ".join(lost[:6]) + (f" and {len(lost) - 6} more" if len(lost) > 6 else "")
        notes = [record.note for record in removals if record.note]
        left = f"{amount(unit, pruner.cost)} {UNITS[unit]} ({pruner.cost / pruner.cost_start:.1%})"
        return f"step {pruner.step_count}: {shown or 'nothing removed'}; {left} left" + "".join(f"; {n}" for n in notes)


def _flatness(curvature: Curvature, total_steps: int, asked: bool | float | Mapping[str, Any]) -> Flatness | None:
    if asked is False:
        return None
    if isinstance(asked, Mapping):
        return Flatness(curvature, total_steps=total_steps, **asked)
    return Flatness(curvature, total_steps=total_steps, strength=STRENGTH if asked is True else float(asked))


def _lr_scheduler(
    optimizer: Any, total_steps: int, asked: str | None, warmup: float, growth: float, schedule: CubicSchedule
) -> PruningLR | None:
    if asked is None:
        for name, given in (("lr_warmup", warmup), ("lr_growth", growth)):
            if given:
                raise ValueError(f"PruneWhileTraining: {name} is {given} without an lr_schedule, expected both")
        return None
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"PruneWhileTraining: lr_schedule is {asked!r} with {type(optimizer).__name__} for an optimizer, expected "
            "one torch.optim.Optimizer; make a PruningLR for each of several"
        )
    end = schedule.events[-1] / total_steps
    return PruningLR(optimizer, total_steps, asked, prune_end=end, warmup=warmup, growth=growth)
