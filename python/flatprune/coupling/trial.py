"""The trial that proves groups of neurons: the network cut must compute what the network computes with them masked.

All groups are cut at once: a random part of each (as many from each slice), then what stayed, then one neuron of each,
then some groups while others stay whole, so that each two are told apart once. Both networks run operator by operator;
the first operator at which they part says which groups to try alone, and what to name when one stays. Tensors of one
value get random ones for the trial, so that nothing hides behind a gain of zero; the model is left as it was.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from flatprune.coupling.attributes import integers, known_attributes, own_shapes, with_integer
from flatprune.coupling.calls import Call, first_lines, traced_mode, unchanged
from flatprune.coupling.components import Components
from flatprune.coupling.cuts import cut_tensor, tensor_cuts
from flatprune.coupling.neurons import Attribute, module_of
from flatprune.coupling.runs import Arithmetic, CutRun, MaskedRun, Step
from flatprune.coupling.tracer import ModuleStack, tensor_leaves
from kfac_ext.curvature.modes import plain_kernels

_OF_EFFECT = {True: 1e-6, False: 1e-3}  # in float64, in the model's own dtype
_OF_SCALE = {True: 1e-10, False: 1e-4}
_SMALL = 0.1  # constants below are drawn anew like zeros
_LEVELS = 3  # modules around a failure whose integers are looked at, innermost first
_HALF, _REST, _ONE = "half", "rest", "one"


class TracedCall(NamedTuple):
    """A call as it was traced.

    Attributes:
        call: its arguments.
        training: the mode.
    """

    call: Call
    training: bool


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


@dataclass
class _Plan:
    """One attempt: which neurons go, and everything that follows.

    Attributes:
        chosen: positions of candidates.
        pruned: position -> neurons.
        attributes: position -> integers found so far.
    """

    chosen: list[int]
    pruned: dict[int, Tensor]
    attributes: dict[int, list[Attribute]] = field(default_factory=dict)


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
        self._model, self._calls, self._components = model, calls, components
        self._modules = dict(model.named_modules())
        self._tensors = {
            name: t
            for k, names in components.table.names.items()
            for name, t in [(name, components.table.tensors[k]) for name in names]
        }
        self._stack = ModuleStack(model)
        self._double = True
        self._full: list[list[Tensor]] = []
        self.attributes: dict[int, list[Attribute]] = {}
        self.partners: dict[int, set[int]] = {}
        self._owner = self._candidates_by_label()

    def prove(self, positions: Sequence[int]) -> dict[int, str]:
        """Try these candidates; those that fail, with the reason."""
        good, bad = list(positions), {}
        with ExitStack() as stack:
            for context in (unchanged(self._model), plain_kernels(), self._stack.watching(), self._random_constants()):
                stack.enter_context(context)
            self._prepare(stack)
            for how in (_HALF, _REST, _ONE, *range(max(positions, default=0).bit_length())):
                while good:
                    failure = self._attempt(good, how)
                    if failure is None:
                        break
                    found = self._refuse(failure, good, how)
                    bad.update(found)
                    good = [position for position in good if position not in found]
        self.attributes = {position: found for position, found in self.attributes.items() if position in good}
        return bad

    def _refuse(self, failure: Failure, good: Sequence[int], how: str | int) -> dict[int, str]:
        """The suspects that fail alone; if none does, one of them, for it fails beside others."""
        how = _HALF if isinstance(how, int) else how
        suspects = [position for position in failure.suspects if position in good] or list(good)
        bad: dict[int, str] = {}
        others = [position for position in good if position not in suspects]
        for position in (*suspects, *others):
            if position in bad or (bad and position in others):
                continue
            alone = failure if len(good) == 1 and how != _HALF else self._attempt([position], how)
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

    def _attempt(self, chosen: Sequence[int], how: str | int) -> Failure | None:
        """Cut some neurons of all chosen candidates; None if all is well."""
        plan = _Plan(list(chosen), {p: self._neurons(p, how) for p in chosen}, {})
        for position in chosen:
            if position in self.attributes:
                plan.attributes[position] = list(self.attributes[position])
        for number, traced in enumerate(self._calls):
            if isinstance(how, int) and traced.training:
                continue
            failure = self._attempt_call(plan, number)
            if failure is not None:
                return failure
        self.attributes.update(plan.attributes)
        return None

    def _attempt_call(self, plan: _Plan, number: int) -> Failure | None:
        try:
            expected, steps = self._masked(plan, number)
        except Exception as error:  # an operator that does not bear what masking does to its results
            return Failure(f"it cannot be masked ({first_lines(error)})", list(plan.chosen), (), (0, 0))
        failure = self._cut(plan, number, expected, steps)
        while failure is not None:
            better = self._better_integer(plan, number, expected, steps, failure)
            if better is None:
                return failure
            failure = better[0]
        return None

    def _neurons(self, position: int, how: str | int) -> Tensor:
        """Random neurons of a candidate, as many of each slice; none if bit `how` of its position is not set."""
        group = self._components.candidates[position].group
        generator = torch.Generator().manual_seed(position)
        own = group.width // group.groups
        step = group.multiple // math.gcd(group.multiple, group.groups)  # of each slice
        least = own % step or step
        most = max(least, own // 2 - position % max(1, own // 4) * step)  # different numbers tell groups apart
        count = least if how == _ONE else least + (most - least) // step * step
        if count >= own or (isinstance(how, int) and not position >> how & 1):
            return torch.empty(0, dtype=torch.int64)
        parts = [(group.group_of == part).nonzero().flatten() for part in range(group.groups)]
        orders = [torch.randperm(own, generator=generator) for _ in parts]
        if how == _REST:  # so that every neuron goes once, in another number for each candidate
            fewer = max(0, min(position % 3 * step, own - count - least))
            found = [part[order[count : own - fewer]] for part, order in zip(parts, orders)]
        else:
            found = [part[order[:count]] for part, order in zip(parts, orders)]
        return torch.cat(found).sort().values

    def _masked(self, plan: _Plan, number: int) -> tuple[list[Tensor], list[Step]]:
        masked = torch.zeros(self._components.total + 1, dtype=torch.bool)
        for position, neurons in plan.pruned.items():
            masked[self._components.candidates[position].labels_of(neurons)] = True
        call, training = self._calls[number]
        run = MaskedRun(self._model, self._stack, self._components, masked, Arithmetic(self._double))
        return self._outputs(run, call, training), run.steps

    def _cut(self, plan: _Plan, number: int, expected: list[Tensor], steps: list[Step]) -> Failure | None:
        """Run the network as it is cut and compare."""
        call, training = self._calls[number]
        run = CutRun(steps, Arithmetic(self._double))
        try:
            with self._applied(plan):
                found = self._outputs(run, call, training)
        except Exception as error:  # whatever the model raises is a reason
            at = run.reached if run.first_off is None else (run.first_off, 0)
            where = run.running if run.first_off is None else ""
            return self._failure(plan, steps, at, f"fails ({first_lines(error)})", tuple(self._stack.names), where)
        if run.first_off is not None:
            return self._failure(plan, steps, (run.first_off, 0), "computes something else")
        if [t.shape for t in found] != [t.shape for t in expected]:
            return Failure("an output changes its shape in a trial cut", list(plan.chosen), (), (len(steps), 0))
        for full, masked, cut in zip(self._full[number], expected, found):
            if not self._equal(full, masked, cut):
                reason = "a trial cut changes the function of the other neurons"
                return Failure(reason, list(plan.chosen), (), (len(steps), 0))
        return None

    def _equal(self, full: Tensor, masked: Tensor, cut: Tensor) -> bool:
        if not masked.is_floating_point() or masked.numel() == 0:
            return True
        effect = (masked - full).abs().nan_to_num(0.0, 0.0, 0.0).max() if masked.shape == full.shape else 0.0
        scale = masked.abs().nan_to_num(0.0, 0.0, 0.0).max()
        tolerance = _OF_EFFECT[self._double] * float(effect) + _OF_SCALE[self._double] * float(scale)
        return torch.allclose(masked, cut, rtol=0, atol=tolerance, equal_nan=True)

    def _failure(
        self,
        plan: _Plan,
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

    # integers in the code

    def _better_integer(
        self, plan: _Plan, number: int, expected: list[Tensor], steps: list[Step], failure: Failure
    ) -> tuple[Failure | None] | None:
        """The integer near a failure with whose change the cut network gets furthest, added to the plan; or None."""
        best: tuple[tuple[int, int], Failure | None, int, Attribute] | None = None
        for position, attribute in self._followable(plan, failure):
            trial = _Plan(plan.chosen, plan.pruned, {**plan.attributes})
            trial.attributes[position] = [*plan.attributes.get(position, ()), attribute]
            outcome = self._cut(trial, number, expected, steps)
            reached = (len(steps) + 1, 0) if outcome is None else outcome.reached
            if reached > failure.reached and (best is None or reached > best[0]):
                best = (reached, outcome, position, attribute)
            if outcome is None:
                break
        if best is None:
            return None
        _, outcome, position, attribute = best
        plan.attributes[position] = [*plan.attributes.get(position, ()), attribute]
        return (outcome,)

    def _followable(self, plan: _Plan, failure: Failure) -> Iterator[tuple[int, Attribute]]:
        """Integers of the modules around a failure that equal a size which a suspect changes.

        Where numbers without labels differ (the root of a width, say), all that a module holds a part of are suspects.
        """
        taken = {(a.module, a.key, a.place) for found in plan.attributes.values() for a in found}
        for name in self._around(failure.modules):
            module = self._modules[name]
            settled = known_attributes(module, own_shapes(module))
            for key, place, value in integers(module):
                if key in settled or (name, key, place) in taken:
                    continue
                owned = {p: self._owned_inside(p, name) for p in failure.suspects or plan.chosen}
                suspects = [p for p in owned if failure.suspects or owned[p]]
                for position in sorted(suspects, key=lambda p: -owned[p]):
                    for step, per in self._changes(position, value):
                        yield position, Attribute(name, key, place, step, per)

    def _owned_inside(self, position: int, module: str) -> int:
        """How many tensors of a candidate a module holds; its integers most likely follow the one with most."""
        members = self._components.candidates[position].group.members
        return sum(any(f"{name}.".startswith(f"{module}.") for name in member.names) for member in members)

    def _around(self, modules: tuple[str, ...]) -> list[str]:
        """The modules around a failure, innermost first, then what stands beside the innermost."""
        around = list(dict.fromkeys(modules[::-1]))[:_LEVELS]
        parent = around[1] if len(around) > 1 else around[0] if around else ""
        beside = [name for name in self._modules if name.startswith(parent + ".") and parent and name not in around]
        return [*around, *beside]

    def _changes(self, position: int, value: int) -> Iterator[tuple[int, int]]:
        """How an integer of this value may follow a candidate's width: (step, per)."""
        group = self._components.candidates[position].group
        found = set()
        for size, count in [(group.width, 1), *((m.size, m.index.shape[1]) for m in group.members)]:
            for pieces in {1, group.groups, *(m.groups for m in group.members)}:
                if size % pieces == 0 and size // pieces == value:
                    shared = math.gcd(count, pieces)
                    found.add((count // shared, pieces // shared))
        yield from sorted(found)

    # the model while it is tried

    def _outputs(self, mode: Any, call: Call, training: bool) -> list[Tensor]:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 - models that draw from NumPy draw from its global stream
        with unchanged(self._model), traced_mode(self._model, training), mode:
            output = call.run(self._model)
        return tensor_leaves(output)

    def _measure_full(self) -> None:
        """The outputs of the whole network."""
        self._full = [
            self._outputs(CutRun([], Arithmetic(self._double)), call, training) for call, training in self._calls
        ]

    def _prepare(self, stack: ExitStack) -> None:
        """Parameters and buffers in float64 where the model runs in that, so that a wrong channel cannot hide."""
        floating = [t for t in self._components.table.tensors.values() if t.is_floating_point()]
        self._double = all(tensor.device.type != "mps" for tensor in floating)
        if self._double:
            held = ExitStack()
            for tensor in floating:
                held.enter_context(_holding(tensor, tensor.data.double()))
            try:
                self._measure_full()
            except Exception:  # a dtype that the code checks
                held.close()
                self._double = False
            else:
                stack.callback(held.close)
                return
        self._measure_full()

    @contextmanager
    def _applied(self, plan: _Plan) -> Iterator[None]:
        """The network as it is cut."""
        groups = [candidate.group for candidate in self._components.candidates]
        touched: dict[str, dict[str, Sequence[int]]] = {}
        with ExitStack() as stack:
            for name, cuts in tensor_cuts(groups, plan.pruned).items():
                tensor = self._tensors[name]
                stack.enter_context(_holding(tensor, cut_tensor(tensor.data, cuts)))
                touched.setdefault(module_of(name), {})
            for name in self._owners_of_tied(touched):
                module = self._modules[name]
                stack.enter_context(_having(module, known_attributes(module, own_shapes(module))))
            for position, attributes in plan.attributes.items():
                for a in attributes:
                    module, removed = self._modules[a.module], len(plan.pruned[position])
                    held = getattr(module, a.key)
                    now = held if a.place is None else held[a.place]
                    stack.enter_context(_having(module, {a.key: with_integer(held, a.place, a.after(now, removed))}))
            yield

    def _owners_of_tied(self, modules: dict[str, Any]) -> list[str]:
        """These modules and all others that hold one of their tensors."""
        wanted = {id(t) for name in modules for t in self._modules[name].parameters(recurse=False)}
        return [
            name
            for name, module in self._modules.items()
            if name in modules or any(id(t) in wanted for t in module.parameters(recurse=False))
        ]

    @contextmanager
    def _random_constants(self) -> Iterator[None]:
        """Parameters and running statistics of one value differ from entry to entry."""
        generator = torch.Generator().manual_seed(0)
        with ExitStack() as stack:
            for key, tensor in self._components.table.tensors.items():
                name = self._components.table.names[key][0].rpartition(".")[2]
                if not tensor.is_floating_point() or tensor.numel() == 0:
                    continue
                if not isinstance(tensor, nn.Parameter) and not name.startswith("running_"):
                    continue
                value = tensor.flatten()[0]
                if bool((tensor == value).all()):
                    drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                    if abs(float(value)) < _SMALL:
                        signs = torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
                        new = (0.3 + 0.5 * drawn) * (signs if name != "running_var" else 1)
                    else:
                        new = float(value) * (0.8 + 0.4 * drawn)
                    stack.enter_context(_holding(tensor, new.to(tensor)))
            yield

    def _candidates_by_label(self) -> Tensor:
        """Flat label -> position of the candidate it belongs to, -1 for none (and at the end)."""
        owner = torch.full((self._components.total + 1,), -1, dtype=torch.int64)
        for position, candidate in enumerate(self._components.candidates):
            owner[candidate.labels] = position
        return owner


def _pattern(name: str) -> str:
    """A tensor's name without its numbers."""
    return "".join("#" if letter.isdigit() else letter for letter in name)


@contextmanager
def _holding(tensor: Tensor, data: Tensor) -> Iterator[None]:
    """A parameter or buffer with other data."""
    before = tensor.data
    tensor.data = data
    try:
        yield
    finally:
        tensor.data = before


@contextmanager
def _having(module: nn.Module, attributes: dict[str, Any]) -> Iterator[None]:
    """A module with other attributes."""
    before = {key: getattr(module, key) for key in attributes}
    try:
        for key, value in attributes.items():
            setattr(module, key, value)
        yield
    finally:
        for key, value in before.items():
            setattr(module, key, value)
