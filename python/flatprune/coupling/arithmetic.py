"""How operators run while a network is tried: in float64, with constants in place of random numbers.

Each operator gets its floating arguments converted, so no dtype written in the code matters. Several *lanes*, calls of
one operator whose numbers differ, share what they have in common: converted weights, a product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatprune.coupling.operators.schemas import mapped, schema_of
from flatprune.coupling.operators.table import RULES
from flatprune.coupling.stand_ins import StandIn, StandIns

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_RANDOM = 0.37  # in place of random numbers of any distribution
# whether these run at all can depend on sizes and strides (contiguous, reshape): no steps of their own
QUIET = frozenset(name for name, found in RULES.items() if found in (RULES["view"], RULES["clone"])) - {
    "native_dropout"
}
_TURNS = frozenset(("t", "transpose", "permute", "detach", "alias"))  # a stand-in stays one
_PRODUCTS = frozenset(("mm", "addmm"))
_CONVOLUTIONS = frozenset(("convolution", "_convolution"))


class Arithmetic:
    """How operators run in both runs of a trial.

    Args:
        double: convert floating arguments and results.
        stand_ins: of parameters.

    Attributes:
        completed: steps that are done; moving entries is none.
        moved: operators that only moved entries since then.
        running: the operator that runs now, "" between two.
    """

    def __init__(self, stand_ins: StandIns, *, double: bool) -> None:
        self.double, self._stand_ins = double, stand_ins
        self.completed = self.moved = 0
        self.running = ""

    def run(self, func: Any, lanes: Sequence[Arguments]) -> list[Any]:
        """The operator's result in each lane."""
        self.running = schema_of(func).name
        outs = self._run(func, lanes)
        if self.running in QUIET:
            self.moved += 1
        else:
            self.completed, self.moved = self.completed + 1, 0
        self.running = ""
        return outs

    def given(self, arguments: Arguments) -> Arguments:
        """Arguments as the operator gets them."""
        return mapped(self.number, arguments[0]), mapped(self.number, arguments[1])

    def is_parameter(self, tensor: Tensor) -> bool:
        """Whether a tensor is a parameter or stands for one."""
        return isinstance(tensor, nn.Parameter) or self._stand_ins.behind(tensor) is not None

    def _run(self, func: Any, lanes: Sequence[Arguments]) -> list[Any]:
        first = lanes[0][0][0] if lanes[0][0] and isinstance(lanes[0][0][0], Tensor) else None
        behind = None if first is None else self._stand_ins.behind(first)
        if behind is not None and self.running in _TURNS:
            turned = func(*lanes[0][0], **lanes[0][1])
            if self._stand_ins.behind(turned) is not None:
                return [turned] * len(lanes)
        if self.running in _PRODUCTS:
            outs = self._products(lanes)
            if outs is not None:
                return outs
        if self.running == "embedding" and behind is not None and not behind[1] and behind[0].is_table:
            return [behind[0].cut_rows(func(behind[0].original, *args[1:], **kwargs)) for args, kwargs in lanes]
        made: dict[int, Tensor] = {}  # what several lanes have in common is converted once

        def once(tensor: Tensor) -> Tensor:
            found = made.get(id(tensor))
            if found is None:
                found = made[id(tensor)] = self.number(tensor)
            return found

        return [self._one(func, args, kwargs, once) for args, kwargs in lanes]

    def _one(self, func: Any, args: Any, kwargs: Any, number: Callable[[Tensor], Tensor]) -> Any:
        schema = schema_of(func)
        if schema.in_place:  # its first argument keeps its dtype
            behind = self._stand_ins.behind(args[0]) if isinstance(args[0], Tensor) else None
            target = args[0] if behind is None else behind[0].to_write()
            given = (target, *mapped(number, args[1:]))
        else:
            given = mapped(number, args)
        named = mapped(number, kwargs)
        if schema.random:
            out = self._steady(func, given, named)
        elif self.double and self.running in _CONVOLUTIONS and _is_depthwise(given):
            out = _depthwise(*given[:6])
        else:
            out = func(*given, **named)
        if "empty" in self.running and isinstance(out, Tensor):
            out.zero_()  # what happens to lie in memory is nothing to compare
        return mapped(_converted, out) if self.double and not schema.in_place else out

    def number(self, tensor: Tensor) -> Tensor:
        """A tensor as an operator gets it."""
        tensor = self._stand_ins.numbers(tensor)
        return _converted(tensor) if self.double else tensor

    def _products(self, lanes: Sequence[Arguments]) -> list[Tensor] | None:
        """[m, k] [k, n], plus something, where the second matrix is a stand-in, which is converted block by block."""
        rest = lanes[0][0][:-2]
        second = lanes[0][0][-1]
        if len(rest) != (self.running == "addmm") or any(kwargs or args[-1] is not second for args, kwargs in lanes):
            return None
        behind = self._stand_ins.behind(second)
        if behind is None or not behind[0].is_matrix or not all(_fit(args) for args, _ in lanes):
            return None
        rows = [self.number(args[-2]) for args, _ in lanes]
        found = _product(torch.cat(rows) if len(rows) > 1 else rows[0], *behind)
        outs = list(found.split([len(r) for r in rows])) if len(rows) > 1 else [found]
        if rest:
            for out, (args, _) in zip(outs, lanes):
                out += self.number(args[0])
        return outs

    def _steady(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = schema_of(func).called
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if "attention" in name:
            return func(*args, **kwargs)
        seed(self.completed)  # integers, say: the same ones in both runs
        out = func(*args, **kwargs)
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                tensor.fill_(1.0 if "bernoulli" in name or "dropout" in name else _RANDOM)
            elif isinstance(tensor, Tensor) and "randint" in name and tensor.numel():
                tensor.fill_(int(tensor.min()))  # one number, whatever the size
        return out


def seed(number: int) -> None:
    """As `torch.manual_seed`, which formats the stack each time for devices that nobody uses."""
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(number)


def _converted(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def _fit(args: Sequence[Tensor]) -> bool:
    """Whether shapes and dtypes of a product are right; if not, torch is to say so."""
    *rest, rows, matrix = args
    fitting = rows.dim() == 2 and rows.shape[1] == matrix.shape[0] and rows.dtype == matrix.dtype
    return fitting and all(t.dim() == 1 and len(t) == matrix.shape[1] for t in rest)


def _product(rows: Tensor, behind: StandIn, transposed: bool) -> Tensor:
    """rows [m, k] times what stands behind a stand-in."""
    n = behind.shape[0] if transposed else behind.shape[1]
    if transposed:
        found = rows.new_empty(len(rows), n)
        for start, stop, block in behind.blocks():
            torch.mm(rows, block.t(), out=found[:, start:stop])
        return found
    found = rows.new_zeros(len(rows), n)
    for start, stop, block in behind.blocks():
        found.addmm_(rows[:, start:stop], block)
    return found


def _is_depthwise(args: Sequence[Any]) -> bool:
    """Whether a convolution has one input channel in each of several groups: in float64 torch runs them one by one."""
    x, weight, transposed, groups = args[0], args[1], args[6], args[8]
    fitting = x.dim() == weight.dim() and x.shape[1] == groups and weight.shape[0] % groups == 0
    return not transposed and groups > 1 == weight.shape[1] and fitting


def _depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, strides: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """A convolution with one input channel a group, as a sum over the entries of the kernel."""
    spatial = x.dim() - 2
    strides, padding, dilation = (n * spatial if len(n) == 1 else n for n in (strides, padding, dilation))
    x = F.pad(x, [n for side in reversed(padding) for n in (side, side)])
    if len(weight) != x.shape[1]:
        x = x.repeat_interleave(len(weight) // x.shape[1], 1)
    sizes = [(x.shape[2 + d] - dilation[d] * (weight.shape[2 + d] - 1) - 1) // strides[d] + 1 for d in range(spatial)]
    out = x.new_zeros(*x.shape[:2], *sizes)
    for place in product(*map(range, weight.shape[2:])):
        piece, factor = x, weight[:, 0]
        for d, at in enumerate(place):
            first = at * dilation[d]
            piece = piece[(slice(None),) * (2 + d) + (slice(first, first + sizes[d] * strides[d], strides[d]),)]
            factor = factor[:, at]
        out.addcmul_(piece, factor.view(1, -1, *[1] * spatial))
    return out if bias is None else out + bias.view(1, -1, *[1] * spatial)
