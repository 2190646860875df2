"""An operator call as rules see it, and the table that rules enter themselves into."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from torch import Tensor

from flatprune.coupling import algebra
from flatprune.coupling.labels import Labels
from flatprune.coupling.neurons import PRODUCER
from flatprune.coupling.operators.schemas import schema_of, tensors_in
from flatprune.coupling.values import Value

Rule = Callable[["Operation"], "Value | list[Value]"]
RULES: dict[str, Rule] = {}


class Operation:
    """One call of an ATen operator.

    Attributes:
        labels: the trace.
        func, args, kwargs, out: the call and its result.
        name: of the operator, without overload and without the underscore of an in-place variant.
        in_place: whether it is one.
    """

    def __init__(self, labels: Labels, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self.labels, self.func, self.args, self.kwargs, self.out = labels, func, args, kwargs, out
        self.schema = schema_of(func)
        self.in_place, self.name = self.schema.in_place, self.schema.name

    @cached_property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return tensors_in((self.args, self.kwargs))

    @cached_property
    def outputs(self) -> list[Tensor]:
        """All tensors of the result."""
        out = self.out if isinstance(self.out, (tuple, list)) else [self.out]
        return [t for t in out if isinstance(t, Tensor)]

    @property
    def makes_anew(self) -> bool:
        """Whether its result holds nothing of its arguments but sizes."""
        return self.name.startswith("new_") or self.name.endswith("_like")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first output."""
        return tuple(self.outputs[0].shape)

    def argument(self, name: str, default: Any = None) -> Any:
        """The argument of that name, or its default."""
        place, usual = self.schema.arguments.get(name, (len(self.args), ()))
        return self.args[place] if place < len(self.args) else self.kwargs.get(name, usual[0] if usual else default)

    def value(self, i: int = 0) -> Value:
        """What is known of the i-th positional argument, a tensor."""
        return self.labels.get(self.args[i])

    def value_of(self, tensor: Tensor) -> Value:
        """What is known of a tensor."""
        return self.labels.get(tensor)


def rule(names: str, *, always: bool = False) -> Callable[[Rule], Rule]:
    """Enter a rule for operators, names apart by spaces.

    Args:
        names: as in `torch.ops.aten`.
        always: called even where no argument has labels: to know what shares memory, or to count products.
    """

    def enter(function: Rule) -> Rule:
        function.always = always  # type: ignore[attr-defined]
        for name in names.split():
            if name in RULES:
                raise ValueError(f"operator {name} has a rule already")
            RULES[name] = function
        return function

    return enter


def fallback(op: Operation) -> Value | list[Value]:
    """For operators without a rule: elementwise if torch says so, else unknown."""
    if op.schema.pointwise:
        return RULES["add"](op)
    for tensor in op.tensors:
        algebra.note_role(op.labels, op.value_of(tensor), PRODUCER)  # so that the refusal names its layer
        for layer in op.value_of(tensor).layers:
            op.labels.findings.pin(layer, f"operator {op.name} is not known (in {op.labels.here})")
        algebra.refuse_statistics(op.labels, op.value_of(tensor))
    return [Value(tuple(tensor.shape)) for tensor in op.outputs]
