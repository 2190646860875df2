"""The trial that proves groups of neurons: the network cut must compute what the network computes with them masked.

All groups are cut at once, in several rounds (`flatprune.coupling.rounds`). Both networks run operator by operator; the
first operator at which they part says which groups to try alone, and what to name when one stays. Tensors of one value
get random ones for the trial, so that nothing hides behind a gain of zero; the model is left as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flatprune.coupling.calls import first_lines
from flatprune.coupling.components import Components
from flatprune.coupling.integers import followable
from flatprune.coupling.masked import Diverged, MaskedRun
from flatprune.coupling.neurons import Attribute
from flatprune.coupling.rounds import HALF, Plan, Round, planned, pruned, rounds
from flatprune.coupling.runs import CutRun, Expected, NoFurther, Step
from flatprune.coupling.tried import TracedCall, TriedModel

_OF_EFFECT = {True: 1e-6, False: 1e-3}  # in float64, in the model's own dtype
_OF_SCALE = {True: 1e-10, False: 1e-4}
_LANES = 16 << 20  # bytes of several masked networks that run at once, or a tenth of the model if that is more


@dataclass
class Failure:
    """Why a trial failed.

    Attributes:
        reason: for people.
        suspects: positions of the candidates that meet where the runs part.
        modules: running there, outermost first.
        reached: steps that agreed, and operators that only moved entries since then.
    """

    reason: str
    suspects: list[int]
    modules: tuple[str, ...]
    reached: tuple[int, int]


class Trial:
    """Trial cuts of one model.

    Args:
        model: it is left as it was.
        calls: as they were traced.
        components: the candidates.

    Attributes:
        attributes: position of a candidate -> integers found to follow its width.
        partners: position of a candidate that failed -> others that failed at the same place.
    """

    def __init__(self, model: nn.Module, calls: Sequence[TracedCall], components: Components) -> None:
        self._tried, self._calls, self._components = TriedModel(model, calls, components), calls, components
        self._memory = max(_LANES, sum(p.nbytes for p in model.parameters()) // 10)
        self.attributes: dict[int, list[Attribute]] = {}
        self.partners: dict[int, set[int]] = {}
        self._owner = self._candidates_by_label()
        self._ahead: dict[tuple[int, Round], Expected] = {}  # (call, round) -> what was masked beside other rounds
        self._beside = False  # whether the last attempt used that
        self._alone: set[int] = set()  # calls that cannot be masked for several rounds at once

    def prove(self, positions: Sequence[int]) -> dict[int, str]:
        """Try these candidates; those that fail, with the reason."""
        good, bad = list(positions), {}
        order = rounds(positions)
        with self._tried.prepared():
            for number, how in enumerate(order):
                while good:
                    failure = self._attempt(good, how, order[number:])
                    if failure is not None and self._beside:  # what Python code sees of numbers may have been another's
                        failure = self._attempt(good, how)
                    if failure is None:
                        break
                    found = self._refuse(failure, good, how)
                    bad.update(found)
                    good = [position for position in good if position not in found]
                    self._ahead.clear()
        self.attributes = {position: found for position, found in self.attributes.items() if position in good}
        return bad

    def _refuse(self, failure: Failure, good: Sequence[int], how: Round) -> dict[int, str]:
        """The suspects that fail alone; if none does, one of them, for it fails beside others."""
        how = HALF if isinstance(how, int) else how
        suspects = [position for position in failure.suspects if position in good] or list(good)
        bad: dict[int, str] = {}
        others = [position for position in good if position not in suspects]
        for position in (*suspects, *others):
            if position in bad or (bad and position in others):
                continue
            alone = failure if len(good) == 1 and how != HALF else self._attempt([position], how)
            if alone is not None and self.attributes.pop(position, []):  # integers that were another group's
                alone = self._attempt([position], how)
            if alone is not None:
                bad[position] = alone.reason
                alike = [p for p in good if p not in bad and self._alike(p, position)]
                if alike and self._attempt(alike, how) is not None:
                    bad.update(dict.fromkeys(alike, alone.reason))
        for position in bad:
            self.partners.setdefault(position, set()).update(p for p in suspects if p in bad)
        if not bad:
            smallest = min(suspects, key=lambda p: self._components.candidates[p].group.width)
            bad[smallest] = failure.reason
        return bad

    def _alike(self, one: int, other: int) -> bool:
        """Whether two candidates are the same place of two layers that repeat."""
        a, b = (self._components.candidates[p].group for p in (one, other))
        return a.width == b.width and [_pattern(m.name) for m in a.members] == [_pattern(m.name) for m in b.members]

    # one attempt

    def _attempt(self, chosen: Sequence[int], how: Round, order: Sequence[Round] = ()) -> Failure | None:
        """Cut some neurons of all chosen candidates; None if all is well.

        With an `order` of rounds, this one and those that follow it are masked at once where that is possible.
        """
        plan = planned(self._components.candidates, chosen, how)
        for position in chosen:
            if position in self.attributes:
                plan.attributes[position] = list(self.attributes[position])
        self._beside = False
        masked: dict[int, Expected] = {}  # the masked network does the same in both modes, if the whole one does
        for number, traced in enumerate(self._calls):
            if isinstance(how, int) and traced.training:
                continue
            like = self._tried.like[number]
            try:
                if like not in masked:
                    ahead = self._looked_ahead(number, chosen, order)
                    self._beside |= ahead is not None
                    masked[like] = ahead or self._masked(number, [plan.pruned])[0]
            except Exception as error:  # an operator that does not bear what masking does to its results
                return Failure(f"it cannot be masked ({first_lines(error)})", list(plan.chosen), (), (0, 0))
            failure = self._attempt_call(plan, number, masked[like])
            if failure is not None:
                return failure
        self.attributes.update(plan.attributes)
        return None

    def _attempt_call(self, plan: Plan, number: int, expected: Expected) -> Failure | None:
        failure = self._cut(plan, number, expected)
        while failure is not None:
            better = self._better_integer(plan, number, expected, failure)
            if better is None:
                return failure
            failure = better[0]
        return None

    def _looked_ahead(self, number: int, chosen: Sequence[int], order: Sequence[Round]) -> Expected | None:
        """What a call computes in the first round of an order, masked beside rounds that follow; None if it is not."""
        if not order or (order[0] == HALF and self.partners):  # where most failures are, after which others are chosen
            return None
        found = self._ahead.pop((number, order[0]), None)
        lanes = self._memory // max(1, 3 * self._tried.largest[number])
        some = [how for how in order if not (isinstance(how, int) and self._calls[number].training)][:lanes]
        if found is not None or len(some) < 2 or number in self._alone:
            return found
        try:
            masked = self._masked(number, [pruned(self._components.candidates, chosen, how) for how in some])
        except (Exception, Diverged):
            self._alone.add(number)
            return None
        first, *others = masked
        self._ahead.update({(number, how): expected for how, expected in zip(some[1:], others)})
        return first

    def _masked(self, number: int, choices: Sequence[Mapping[int, Tensor]]) -> list[Expected]:
        """What a call computes with the neurons of each choice masked."""
        masked = torch.zeros(len(choices), self._components.total + 1, dtype=torch.bool)
        for lane, choice in zip(masked, choices):
            for position, neurons in choice.items():
                lane[self._components.candidates[position].labels_of(neurons)] = True
        tried = self._tried
        run = MaskedRun(tried.model, tried.stack, self._components, masked, tried.arithmetic())
        outputs = [run.in_lanes(tensor) for tensor in tried.outputs(run, number)]
        return [
            Expected([of_lanes[lane] for of_lanes in outputs], run.steps, run.digests[lane])
            for lane in range(len(choices))
        ]

    def _cut(self, plan: Plan, number: int, expected: Expected, worth: tuple[int, int] = (-1, 0)) -> Failure | None:
        """Run the network as it is cut and compare; no further than it takes to know that it gets no further."""
        run, steps = CutRun(expected, self._tried.arithmetic(), worth), expected.steps
        try:
            with self._tried.cut(plan):
                found = self._tried.outputs(run, number)
        except NoFurther:
            return Failure("", [], (), worth)
        except Exception as error:  # whatever the model raises is a reason
            at = run.reached if run.first_off is None else (run.first_off, 0)
            where = run.running if run.first_off is None else ""
            modules = tuple(self._tried.stack.names)
            return self._failure(plan, steps, at, f"fails ({first_lines(error)})", modules, where)
        if run.first_off is not None:
            return self._failure(plan, steps, (run.first_off, 0), "computes something else")
        if [t.shape for t in found] != [t.shape for t in expected.outputs]:
            return Failure("an output changes its shape in a trial cut", list(plan.chosen), (), (len(steps), 0))
        for full, masked, cut in zip(self._tried.full[number], expected.outputs, found):
            if not self._equal(full, masked, cut):
                reason = "a trial cut changes the function of the other neurons"
                return Failure(reason, list(plan.chosen), (), (len(steps), 0))
        return None

    def _equal(self, full: Tensor, masked: Tensor, cut: Tensor) -> bool:
        if not masked.is_floating_point() or masked.numel() == 0:
            return True
        effect = (masked - full).abs().nan_to_num(0.0, 0.0, 0.0).max() if masked.shape == full.shape else 0.0
        scale = masked.abs().nan_to_num(0.0, 0.0, 0.0).max()
        tolerance = _OF_EFFECT[self._tried.double] * float(effect) + _OF_SCALE[self._tried.double] * float(scale)
        return torch.allclose(masked, cut, rtol=0, atol=tolerance, equal_nan=True)

    def _failure(
        self,
        plan: Plan,
        steps: list[Step],
        reached: tuple[int, int],
        what: str,
        modules: tuple[str, ...] = (),
        operator: str = "",
    ) -> Failure:
        """Who is involved where the runs part."""
        at = reached[0]
        near = steps[max(0, at - 1) : at + 1] if modules else steps[at : at + 1]
        suspects: dict[int, None] = {}
        for step in reversed(near):
            for layer in step.layers:
                for owner in self._owner[self._components.known(layer)].unique().tolist():
                    if owner in plan.chosen:
                        suspects[owner] = None
        last = near[-1] if near else None
        modules = modules or (last.modules if last else ())
        operator = operator or (last.name if last else "the end")
        place = f"{operator} in {(modules[-1] if modules else '') or 'the model'}"
        return Failure(f"a trial cut {what} at {place}", list(suspects), modules, reached)

    def _better_integer(
        self, plan: Plan, number: int, expected: Expected, failure: Failure
    ) -> tuple[Failure | None] | None:
        """The integer near a failure with whose change the cut network gets furthest, added to the plan; or None."""
        best: tuple[tuple[int, int], Failure | None, int, Attribute] | None = None
        groups = {position: self._components.candidates[position].group for position in plan.chosen}
        taken = [attribute for found in plan.attributes.values() for attribute in found]
        near = followable(self._tried.modules, failure.modules, failure.suspects, groups, taken)
        for position, attribute in near:
            worth = max(failure.reached, best[0]) if best else failure.reached
            outcome = self._cut(plan.following(position, attribute), number, expected, worth)
            reached = (len(expected.steps) + 1, 0) if outcome is None else outcome.reached
            if reached > worth:
                best = (reached, outcome, position, attribute)
            if outcome is None:
                break
        if best is None:
            return None
        _, outcome, position, attribute = best
        plan.attributes[position] = [*plan.attributes.get(position, ()), attribute]
        return (outcome,)

    def _candidates_by_label(self) -> Tensor:
        """Flat label -> position of the candidate it belongs to, -1 for none (and at the end)."""
        owner = torch.full((self._components.total + 1,), -1, dtype=torch.int64)
        for position, candidate in enumerate(self._components.candidates):
            owner[candidate.labels] = position
        return owner


def _pattern(name: str) -> str:
    """A tensor's name without its numbers."""
    return "".join("#" if letter.isdigit() else letter for letter in name)
