"""The second run of a trial: the network as it is cut, held against the masked one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flatprune.coupling.arithmetic import QUIET, Arithmetic
from flatprune.coupling.operators.schemas import schema_of, tensors_in

Digest = tuple[float, float]  # sum, sum of absolute values: entries of zero do not change them
_OFF = {True: 1e-7, False: 1e-3}  # in float64, in the model's own dtype


@dataclass
class Step:
    """One operator of the masked run.

    Attributes:
        name: of the operator.
        modules: running then, outermost first.
        layers: labels of its arguments and results.
    """

    name: str
    modules: tuple[str, ...]
    layers: list[Tensor]


@dataclass
class Expected:
    """What a masked run has computed.

    Attributes:
        outputs: of the model.
        steps: one for each operator.
        digests: of each step, of each result that masked and cut run must share; None for others.
    """

    outputs: list[Tensor]
    steps: list[Step]
    digests: list[list[Digest | None]]


class FullRun(TorchDispatchMode):
    """The network as it is.

    Attributes:
        largest: bytes of arguments and results of the operator that has most.
        operators: that ran, each with the numbers that it was given.
    """

    def __init__(self, arithmetic: Arithmetic) -> None:
        super().__init__()
        self._arithmetic = arithmetic
        self.largest = 0
        self.operators: list[tuple[Any, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator."""
        (out,) = self._arithmetic.run(func, [(args, kwargs or {})])
        self.operators.append((func, repr([item for item in args if isinstance(item, (int, float, bool, str))])))
        held = tensors_in((args, out))
        self.largest = max(self.largest, sum(_bytes(t) for t in held if not self._arithmetic.is_parameter(t)))
        return out


class CutRun(TorchDispatchMode):
    """The network as it is cut, its operators held against the steps of the masked run.

    Args:
        expected: of the masked run.
        arithmetic: as there.

    Attributes:
        first_off: the first step whose result differs, or None.
    """

    def __init__(self, expected: Expected, arithmetic: Arithmetic) -> None:
        super().__init__()
        self._expected, self._arithmetic = expected, arithmetic
        self.first_off: int | None = None

    @property
    def reached(self) -> tuple[int, int]:
        """Steps that ran, and operators that only moved entries since then."""
        return self._arithmetic.completed, self._arithmetic.moved

    @property
    def running(self) -> str:
        """The operator that raised, if one did."""
        return self._arithmetic.running

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and compare."""
        (out,) = self._arithmetic.run(func, [(args, kwargs or {})])
        if self.first_off is None and schema_of(func).name not in QUIET:
            number = self._arithmetic.completed - 1
            if number >= len(self._expected.steps) or self._differs(number, func, tensors_in(out)):
                self.first_off = number
        return out

    def _differs(self, number: int, func: Any, outputs: Sequence[Tensor]) -> bool:
        if self._expected.steps[number].name != schema_of(func).name:
            return True
        for expected, tensor in zip(self._expected.digests[number], outputs):
            found = None if expected is None else digest(tensor)
            if expected is not None and found is not None:
                scale = max(expected[1], found[1])
                if abs(expected[0] - found[0]) > _OFF[self._arithmetic.double] * scale + 1e-12:
                    return True
        return False


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()  # `nbytes` is not for sparse ones


def digest(tensor: Tensor) -> Digest | None:
    """(sum, sum of absolute values), which entries of zero do not change; None without finite numbers."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return None
    total = float(tensor.sum(dtype=torch.float64))
    size = float(torch.linalg.vector_norm(tensor, 1, dtype=torch.float64))
    return (total, size) if size - size == 0.0 else None
