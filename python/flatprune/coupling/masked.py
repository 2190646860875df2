"""The first run of a trial: the whole network with neurons masked by their labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flatprune.coupling.arithmetic import QUIET, Arguments, Arithmetic
from flatprune.coupling.components import Components
from flatprune.coupling.findings import NoFindings
from flatprune.coupling.notes import Notes
from flatprune.coupling.operators.movement import shares_memory
from flatprune.coupling.operators.reductions import STATISTICS, reduced_dims
from flatprune.coupling.operators.schemas import mapped, schema_of, tensors_in
from flatprune.coupling.operators.table import RULES, Operation
from flatprune.coupling.runs import Digest, Step, digest
from flatprune.coupling.survivors import JOINT_NORMS, norm_of_survivors
from flatprune.coupling.tracer import ModuleStack, Tracer
from flatprune.coupling.values import varying

_STATISTICS = frozenset(STATISTICS.split())
# where the factors of a product stand: what one of them alone has is masked in the result
_OPERANDS = {"mm": slice(2), "addmm": slice(1, 3), "convolution": slice(2), "_convolution": slice(2)}
_PICKING = frozenset(name for name, found in RULES.items() if found in (RULES["view"], RULES["index"]))


class Diverged(BaseException):
    """Lanes cannot go on together: numbers decide what runs, or an operator writes to what they share."""


class MaskedRun(Tracer):
    """The network in which some labels are zero everywhere and statistics run over the others.

    One forward does it for several choices of labels, each in a *lane*: the model sees tensors of the first; every
    operator runs once for each.

    Args:
        components: of the traces.
        masked: bool [lanes, flat labels + 1], True for what is masked; the last entry stands for no label.
        arithmetic: how operators run.

    Attributes:
        steps: one for each operator.
        digests: of each lane, of each step.
    """

    def __init__(
        self,
        model: nn.Module,
        stack: ModuleStack,
        components: Components,
        masked: Tensor,
        arithmetic: Arithmetic,
    ) -> None:
        super().__init__(model, components.table, NoFindings(), stack)
        self._components, self._masked, self._arithmetic = components, masked, arithmetic
        self.steps: list[Step] = []
        self.digests: list[list[list[Digest | None]]] = [[] for _ in masked]
        self._others: Notes[list[Tensor]] = Notes("lanes")  # what a tensor is in the second lane and on
        self._lanes: list[Arguments] = []
        self._outs: list[Any] = []

    def in_lanes(self, tensor: Tensor) -> list[Tensor]:
        """What a tensor that the model sees is in each lane."""
        others = self._others.get(tensor)
        return [tensor] * len(self._masked) if others is None else [tensor, *others]

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """In float64, with constants, in each lane; of parameters alone, which nothing masks, as far as they stay."""
        self._lanes = self._arguments(func, args, kwargs)
        if self._sees_parameters_alone(func, args, kwargs):
            self._lanes = [
                (mapped(mask, a), mapped(mask, k))
                for mask, (a, k) in zip(map(self._parameter_mask, range(len(self._masked))), self._lanes)
            ]
        self._outs = self._arithmetic.run(func, self._lanes)
        return self._outs[0]

    # lanes

    def _arguments(self, func: Any, args: Any, kwargs: Any) -> list[Arguments]:
        """Of each lane; of the first alone where a view of a parameter is taken."""
        if len(self._masked) == 1:
            return [(args, kwargs)]
        schema, tensors = schema_of(func), tensors_in((args, kwargs))
        others = {id(t): found for t in tensors if (found := self._others.get(t)) is not None}
        for name in schema.written:
            place = schema.arguments[name][0]
            if any(id(t) not in others for t in tensors_in(args[place] if place < len(args) else kwargs.get(name))):
                raise Diverged
        if not others and tensors and schema.is_view:
            return [(args, kwargs)]

        def lane(number: int) -> Arguments:
            def of_lane(tensor: Tensor) -> Tensor:
                return others[id(tensor)][number] if id(tensor) in others else tensor

            return mapped(of_lane, args), mapped(of_lane, kwargs)

        return [(args, kwargs), *(lane(number) for number in range(len(self._masked) - 1))]

    def _note_lanes(self, op: Operation) -> None:
        """Whatever Python code can see of results must be the same in all lanes."""
        if len(self._outs) == 1:
            return
        leaves = [tree_leaves(out) for out in self._outs]
        if any(len(found) != len(leaves[0]) for found in leaves):
            raise Diverged
        for found in zip(*leaves):
            tensors = [t for t in found if isinstance(t, Tensor)]
            if not tensors:
                if any(item != found[0] for item in found):
                    raise Diverged
                continue
            first, *others = tensors
            if any(t.shape != first.shape for t in others):
                raise Diverged
            if not op.in_place:
                self._others.put(first, others)
        if op.name in _PICKING and self.get(op.args[0]).layers:
            self._check_indices(op)

    def _check_indices(self, op: Operation) -> None:
        """Labels that are picked by numbers are the same in all lanes if the numbers are."""
        for tensor in op.tensors[1:]:
            for other in self._others.get(tensor) or ():
                if not torch.equal(tensor, other):
                    raise Diverged

    # masks

    def _sees_parameters_alone(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether nothing that is masked meets parameters with labels in whose result entries of both mix."""
        schema = schema_of(func)
        if schema.aliases or schema.name == "embedding":
            return False
        values = [self.get(t) for t in tensors_in((args, kwargs))]
        if schema.name in _OPERANDS and not all(value.layers for value in values[_OPERANDS[schema.name]]):
            return False
        return any(value.layers for value in values) and all(value.param or not value.layers for value in values)

    def _parameter_mask(self, lane: int) -> Callable[[Tensor], Tensor]:
        def masked(tensor: Tensor) -> Tensor:
            layers = self.get(tensor).layers if tensor.is_floating_point() else ()
            for masks in self._masks(layers):
                if bool(masks[lane].any()):
                    tensor = self._arithmetic.number(tensor).masked_fill(masks[lane].to(tensor.device), 0)
            return tensor

        return masked

    def finish(self, op: Operation) -> Any:
        """Mask the result."""
        self._note_lanes(op)
        lanes = [tensors_in(out) for out in self._outs]
        if _is_joint(op) or op.name in _STATISTICS:
            self._over_survivors(op)
        quiet = op.name in QUIET
        digests: list[list[Digest | None]] = [[] for _ in lanes]
        for i, tensor in enumerate(op.outputs):
            value = self.get(tensor)
            owned = id(tensor) in self.table.names
            if tensor.is_floating_point() and not owned and not self._is_view(op, tensor):  # of what is masked already
                for masks in self._masks(value.layers):
                    for outputs, mask in zip(lanes, masks):
                        outputs[i].data.masked_fill_(mask.to(tensor.device), 0)
            comparable = not quiet and not value.free and not value.loose and not owned and not value.stats
            comparable = comparable and (i == 0 or bool(value.layers))  # others are means, log-sums and the like
            comparable = comparable and "empty" not in op.name
            for outputs, found in zip(lanes, digests):
                found.append(digest(outputs[i]) if comparable else None)
        if not quiet:
            layers = [layer for t in (*op.tensors, *op.outputs) for layer in self.get(t).layers]
            self.steps.append(Step(op.name, tuple(self.stack.names), layers))
            for i, of_lane in enumerate(self.digests):
                of_lane.append(digests[min(i, len(digests) - 1)])
        return op.out

    def _is_view(self, op: Operation, tensor: Tensor) -> bool:
        """Whether a result shares memory with an argument that the operator does not write to."""
        if op.in_place:
            return False
        if op.schema.is_view and any(self.parameter_key(other) is not None for other in op.tensors):
            return True  # of what stood in for it
        return any(other is not tensor and shares_memory(tensor, other) for other in op.tensors)

    def _masks(self, layers: Sequence[Tensor]) -> list[Tensor]:
        """Which entries are masked in each lane: for each layer that has such, bool [lanes, *layer]."""
        found = []
        for layer in layers:
            masks = self._masked[:, self._components.known(layer)]
            if bool(masks.any()):
                found.append(masks)
        return found

    def _over_survivors(self, op: Operation) -> None:
        """Norms and statistics over channels, some of which are masked."""
        layers = self.get(op.args[0]).layers
        masks = self._masks(layers)
        for number, (arguments, out) in enumerate(zip(self._lanes, self._outs)):
            masked = [mask[number] for mask in masks if bool(mask[number].any())]
            if not masked:
                continue
            args, kwargs = self._arithmetic.given(arguments)
            own = Operation(self, op.func, args, kwargs, out)
            gone = torch.zeros((), dtype=torch.bool)
            for mask in masked:
                gone = gone | mask
            gone = gone.to(args[0].device).expand(args[0].shape)
            if op.name == "_weight_norm_interface":
                for old, new in zip(own.outputs, op.func(args[0].masked_fill(gone, 0), *args[1:], **kwargs)):
                    old.copy_(new)
            elif _is_joint(op):
                own.outputs[0].copy_(norm_of_survivors(own, ~gone))
            else:
                self._statistic(own, layers, self._masked[number])

    def _statistic(self, op: Operation, layers: Sequence[Tensor], masked: Tensor) -> None:
        x = op.args[0]
        dims = {d % x.dim() for d in reduced_dims(op, x.dim())} if x.dim() else set()
        for layer in layers:
            along = varying(layer) & dims
            if len(along) == 1 and varying(layer) == along:
                (d,) = along
                stays = ~masked[self._components.known(layer)].flatten()
                if bool(stays.all()) or not bool(stays.any()):
                    continue
                x = x.index_select(d, stays.nonzero().flatten().to(x.device))
        if x.shape == op.args[0].shape:
            return
        new = op.func(x, *op.args[1:], **op.kwargs)
        for old, value in zip(op.outputs, new if isinstance(new, (tuple, list)) else [new]):
            if old.shape == value.shape:
                old.copy_(value)


def _is_joint(op: Operation) -> bool:
    """Whether its statistics run over channels; those of a batch norm do where a weight is standardised."""
    return op.name in JOINT_NORMS or ("batch_norm" in op.name and op.argument("training") is True)
