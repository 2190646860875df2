"""The model while it is tried: with random constants, in float64, whole or cut; it is left as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from flatprune.coupling.arithmetic import Arithmetic, seed
from flatprune.coupling.attributes import known_attributes, own_shapes, with_integer
from flatprune.coupling.calls import traced_mode, unchanged
from flatprune.coupling.components import Components
from flatprune.coupling.neurons import module_of
from flatprune.coupling.rounds import Plan
from flatprune.coupling.runs import FullRun
from flatprune.coupling.stand_ins import StandIns, holding
from flatprune.coupling.tracer import ModuleStack, tensor_leaves
from kfac_ext.curvature.modes import plain_kernels
from kfac_ext.curvature.recent import Call

_SMALL = 0.1  # constants below are drawn anew like zeros


class TracedCall(NamedTuple):
    """A call as it was traced.

    Attributes:
        call: its arguments.
        training: the mode.
    """

    call: Call
    training: bool


class TriedModel:
    """A model while trials run.

    Args:
        model: as it is.
        calls: as they were traced.
        components: the candidates.

    Attributes:
        model: the same.
        modules: by name.
        stack: the modules that are running.
        double: whether it runs in float64.
        full: outputs of the whole network, of each call.
        largest: bytes of arguments and results of the operator that has most, of each call.
        like: of each call, the first one of which the whole network computes the same by the same operators: itself,
            or the call in evaluation mode.
    """

    def __init__(self, model: nn.Module, calls: Sequence[TracedCall], components: Components) -> None:
        self.model, self.calls = model, calls
        self.modules = dict(model.named_modules())
        self.stack = ModuleStack(model)
        self.double = True
        self.full: list[list[Tensor]] = []
        self.largest: list[int] = []
        self.like: list[int] = []
        self._table = components.table
        self._tensors = {name: self._table.tensors[key] for key, names in self._table.names.items() for name in names}
        self._stand_ins = StandIns([], double=False)

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Ready for runs inside."""
        with ExitStack() as stack:
            for context in (unchanged(self.model), plain_kernels(), self.stack.watching(), self._random_constants()):
                stack.enter_context(context)
            self._use_double(stack)
            yield

    def arithmetic(self) -> Arithmetic:
        """How operators of one run do it."""
        return Arithmetic(self._stand_ins, double=self.double)

    def outputs(self, mode: Any, number: int) -> list[Tensor]:
        """The tensors that the model returns for a call, run under a dispatch mode."""
        seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 - models that draw from NumPy draw from its global stream
        call, training = self.calls[number]
        self.stack.clear()
        with unchanged(self.model), traced_mode(self.model, training), mode:
            output = call.run(self.model)
        return tensor_leaves(output)

    def _use_double(self, stack: ExitStack) -> None:
        """In float64 where the model runs in that, so that a wrong channel cannot hide."""
        tensors = list(self._table.tensors.values())
        self.double = all(tensor.device.type != "mps" for tensor in tensors if tensor.is_floating_point())
        self._stand_ins = StandIns(tensors, double=self.double)
        if self.double:
            held = ExitStack()
            for tensor in tensors:
                if tensor.is_floating_point():
                    held.enter_context(self._stand_ins.seen(tensor))
            try:
                self._measure_full()
            except Exception:  # a dtype that the code checks
                held.close()
                self.double = False
                self._stand_ins = StandIns(tensors, double=False)
            else:
                stack.callback(held.close)
                return
        self._measure_full()

    def _measure_full(self) -> None:
        """The outputs of the whole network."""
        runs = [FullRun(self.arithmetic()) for _ in self.calls]
        self.full = [self.outputs(run, number) for number, run in enumerate(runs)]
        self.largest = [run.largest for run in runs]
        self.like = [self._first_like(number, runs) for number in range(len(runs))]

    def _first_like(self, number: int, runs: Sequence[FullRun]) -> int:
        for other in range(number):
            if self.calls[other].call is self.calls[number].call and runs[other].operators == runs[number].operators:
                pairs = zip(self.full[other], self.full[number], strict=True)
                if all(torch.equal(one, two) for one, two in pairs):
                    return other
        return number

    @contextmanager
    def cut(self, plan: Plan) -> Iterator[None]:
        """The network as it is cut."""
        touched: dict[str, None] = {}
        with ExitStack() as stack:
            for name, cuts in plan.cuts.items():
                stack.enter_context(self._stand_ins.seen(self._tensors[name], cuts))
                touched[module_of(name)] = None
            for name in self._owners_of_tied(touched):
                module = self.modules[name]
                stack.enter_context(_having(module, known_attributes(module, own_shapes(module))))
            for position, attributes in plan.attributes.items():
                for a in attributes:
                    module, removed = self.modules[a.module], len(plan.pruned[position])
                    held = getattr(module, a.key)
                    now = held if a.place is None else held[a.place]
                    stack.enter_context(_having(module, {a.key: with_integer(held, a.place, a.after(now, removed))}))
            yield

    def _owners_of_tied(self, modules: dict[str, None]) -> list[str]:
        """These modules and all others that hold one of their tensors."""
        wanted = {id(t) for name in modules for t in self.modules[name].parameters(recurse=False)}
        return [
            name
            for name, module in self.modules.items()
            if name in modules or any(id(t) in wanted for t in module.parameters(recurse=False))
        ]

    @contextmanager
    def _random_constants(self) -> Iterator[None]:
        """Parameters and running statistics of one value differ from entry to entry."""
        generator = torch.Generator().manual_seed(0)
        with ExitStack() as stack:
            for key, tensor in self._table.tensors.items():
                name = self._table.names[key][0].rpartition(".")[2]
                if not tensor.is_floating_point() or tensor.numel() == 0:
                    continue
                if not isinstance(tensor, nn.Parameter) and not name.startswith("running_"):
                    continue
                low, high = map(float, torch.aminmax(tensor.detach()))
                if low == high:
                    drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                    if abs(low) < _SMALL:
                        signs = torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
                        new = (0.3 + 0.5 * drawn) * (signs if name != "running_var" else 1)
                    else:
                        new = low * (0.8 + 0.4 * drawn)
                    stack.enter_context(holding(tensor, new.to(tensor)))
            yield


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
