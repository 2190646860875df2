"""The two runs of a trial, which must compute the same: with neurons masked by their labels, and with them cut.

Both see every number in float64 (each operator gets its floating arguments converted, so that no copy of the model is
needed and no dtype written in the code matters) and constants in place of random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from flatprune.coupling.components import Components
from flatprune.coupling.findings import NoFindings
from flatprune.coupling.operators.movement import shares_memory
from flatprune.coupling.operators.reductions import STATISTICS, reduced_dims
from flatprune.coupling.operators.table import RULES, Operation
from flatprune.coupling.tracer import ModuleStack, Tracer
from flatprune.coupling.values import varying

_RANDOM = 0.37  # in place of random numbers of any distribution
_JOINT = {"native_layer_norm", "_fused_rms_norm", "rms_norm", "native_group_norm", "_weight_norm_interface"}
_STATISTICS = frozenset(STATISTICS.split())
# whether these run at all can depend on sizes and strides (contiguous, reshape): no steps of their own
_QUIET = frozenset(name for name, found in RULES.items() if found in (RULES["view"], RULES["clone"])) - {
    "native_dropout"
}


@dataclass
class Step:
    """One operator of the masked run.

    Attributes:
        name: of the operator.
        modules: running then, outermost first.
        layers: labels of its arguments and results.
        digests: (sum, sum of absolute values) of each result that masked and cut run must share; None for others.
    """

    name: str
    modules: tuple[str, ...]
    layers: list[Tensor]
    digests: list[tuple[float, float] | None]


class Arithmetic:
    """How operators run in both: in float64 or as they are, random ones with constants.

    Args:
        double: convert floating arguments and results.

    Attributes:
        completed: steps that are done; moving entries is none.
        moved: operators that only moved entries since then.
        running: the operator that runs now, "" between two.
    """

    def __init__(self, double: bool) -> None:
        self.double = double
        self.completed = self.moved = 0
        self.running = ""

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operator's result."""
        self.running = operator_name(func)
        out = self._run(func, args, kwargs)
        if self.running in _QUIET:
            self.moved += 1
        else:
            self.completed, self.moved = self.completed + 1, 0
        self.running = ""
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        writes = func._schema.name.endswith("_")  # in place: its first argument keeps its dtype
        given, named = args, kwargs
        if self.double:
            rest = tree_map(_converted, args[1:] if writes else args)
            given, named = (*args[:1], *rest) if writes else rest, tree_map(_converted, kwargs)
        out = (
            self._steady(func, given, named)
            if torch.Tag.nondeterministic_seeded in func.tags
            else func(*given, **named)
        )
        if "empty" in self.running and isinstance(out, Tensor):
            out.zero_()  # what happens to lie in memory is nothing to compare
        return tree_map(_converted, out) if self.double and not writes else out

    def _steady(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func._schema.name.split("::")[1]
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        torch.manual_seed(self.completed)  # integers, say: the same ones in both runs
        out = func(*args, **kwargs)
        if "attention" in name:
            return out
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                tensor.fill_(1.0 if "bernoulli" in name or "dropout" in name else _RANDOM)
            elif isinstance(tensor, Tensor) and "randint" in name and tensor.numel():
                tensor.fill_(int(tensor.min()))  # one number, whatever the size
        return out


def operator_name(func: Any) -> str:
    """As the table of rules has it."""
    name = func._schema.name.split("::")[1]
    return name if name.startswith("__") else name.removesuffix("_")


def _converted(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype != torch.float64:
        return leaf.double()
    return leaf


class MaskedRun(Tracer):
    """The network in which some labels are zero everywhere and statistics run over the others.

    Args:
        components: of the traces.
        masked: bool [flat labels + 1], True for what is masked; the last entry stands for no label.

    Attributes:
        steps: one for each operator.
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

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """In float64, with constants; of parameters alone, which nothing masks, as far as they stay."""
        if all(result.alias_info is None for result in func._schema.returns):
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            if tensors and all(self.get(t).param or not self.get(t).layers for t in tensors):
                args, kwargs = tree_map(self._masked_parameter, (args, kwargs))
        return self._arithmetic.run(func, args, kwargs)

    def _masked_parameter(self, leaf: Any) -> Any:
        layers = self.get(leaf).layers if isinstance(leaf, Tensor) and leaf.is_floating_point() else ()
        mask = self.mask(layers, leaf) if layers else None
        return leaf if mask is None else leaf.masked_fill(mask, 0)

    def finish(self, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
        """Mask the result."""
        op = Operation(self, func, args, kwargs, out)
        if _is_joint(op) or op.name in _STATISTICS:
            self._over_survivors(op)
        digests: list[tuple[float, float] | None] = []
        layers = [layer for t in op.tensors for layer in self.get(t).layers]
        for i, tensor in enumerate(op.outputs):
            value = self.get(tensor)
            layers += value.layers
            owned = id(tensor) in self.table.names
            if tensor.is_floating_point() and not owned and not _is_view(op, tensor):  # of what is masked already
                mask = self.mask(value.layers, tensor)
                if mask is not None:
                    tensor.data.masked_fill_(mask, 0)
            comparable = not value.free and not value.loose and not owned and not value.stats
            comparable = comparable and (i == 0 or bool(value.layers))  # others are means, log-sums and the like
            comparable = comparable and "empty" not in op.name
            digests.append(digest(tensor) if comparable else None)
        if op.name not in _QUIET:
            self.steps.append(Step(op.name, tuple(self.stack.names), layers, digests))
        return out

    def mask(self, layers: Sequence[Tensor], tensor: Tensor) -> Tensor | None:
        """Which entries are masked; None if none is."""
        found = None
        for layer in layers:
            masked = self._masked[self._components.known(layer)]
            if bool(masked.any()):
                masked = masked.to(tensor.device).expand(tensor.shape)
                found = masked if found is None else found | masked
        return found

    def _over_survivors(self, op: Operation) -> None:
        """Norms and statistics over channels, some of which are masked."""
        x = op.args[0]
        masked = self.mask(self.get(x).layers, x)
        if masked is None:
            return
        x = _converted(x) if self._arithmetic.double else x
        if op.name == "_weight_norm_interface":
            kept = x.masked_fill(masked, 0)
            for old, new in zip(op.outputs, op.func(kept, *op.args[1:], **op.kwargs)):
                old.copy_(new)
        elif _is_joint(op):
            op.outputs[0].copy_(_norm(op, x, ~masked))
        else:
            self._statistic(op, x)

    def _statistic(self, op: Operation, x: Tensor) -> None:
        dims = {d % x.dim() for d in reduced_dims(op, x.dim())} if x.dim() else set()
        for layer in self.get(op.args[0]).layers:
            along = varying(layer) & dims
            if len(along) == 1 and varying(layer) == along:
                (d,) = along
                stays = ~self._masked[self._components.known(layer)].flatten()
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
    return op.name in _JOINT or ("batch_norm" in op.name and op.argument("training") is True)


def _is_view(op: Operation, tensor: Tensor) -> bool:
    """Whether a result shares memory with an argument that the operator does not write to."""
    return not op.in_place and any(other is not tensor and shares_memory(tensor, other) for other in op.tensors)


def _norm(op: Operation, x: Tensor, stays: Tensor) -> Tensor:
    """Layer, root-mean-square or group norm over the entries that stay."""
    weight, bias = _affine(op, x)
    eps = op.argument("eps")
    rows, alive = x, stays.to(x.dtype).expand(x.shape)
    if op.name == "native_group_norm":
        groups = op.argument("group")
        rows, alive = (t.reshape(len(x), groups, -1) for t in (rows, alive))
        dims: tuple[int, ...] = (2,)
    elif op.name not in _JOINT:  # a batch norm
        dims = (0, *range(2, x.dim()))
    else:
        dims = tuple(range(x.dim() - len(op.args[1]), x.dim()))
    count = alive.sum(dim=dims, keepdim=True).clamp_min(1)
    if "rms" in op.name:
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        values = rows * ((alive * rows.square()).sum(dim=dims, keepdim=True) / count + eps).rsqrt()
    else:
        mean = (alive * rows).sum(dim=dims, keepdim=True) / count
        variance = (alive * (rows - mean).square()).sum(dim=dims, keepdim=True) / count
        values = (rows - mean) * (variance + eps).rsqrt()
    values = values.view(x.shape)
    values = values if weight is None else values * weight
    return stays * (values if bias is None else values + bias)


def _affine(op: Operation, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    vectors = [op.argument("weight"), op.argument("bias")]
    shape = [1, -1, *[1] * (x.dim() - 2)] if op.name == "native_group_norm" or op.name not in _JOINT else None
    found = [t if t is None or shape is None else t.view(shape) for t in vectors]
    return found[0], found[1]


class CutRun(TorchDispatchMode):
    """The network as it is cut, its operators held against the steps of the masked run.

    Args:
        steps: of the masked run.
        arithmetic: of both.

    Attributes:
        first_off: the first step whose result differs, or None.
    """

    def __init__(self, steps: Sequence[Step], arithmetic: Arithmetic) -> None:
        super().__init__()
        self._steps, self._arithmetic = steps, arithmetic
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
        out = self._arithmetic.run(func, args, kwargs or {})
        if self.first_off is None and operator_name(func) not in _QUIET:
            number = self._arithmetic.completed - 1
            outputs = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor)]
            if number >= len(self._steps) or self._differs(self._steps[number], func, outputs):
                self.first_off = number
        return out

    def _differs(self, step: Step, func: Any, outputs: Sequence[Tensor]) -> bool:
        if step.name != operator_name(func):
            return True
        tolerance = 1e-7 if self._arithmetic.double else 1e-3
        for expected, tensor in zip(step.digests, outputs):
            found = None if expected is None else digest(tensor)
            if expected is not None and found is not None:
                scale = max(expected[1], found[1])
                if abs(expected[0] - found[0]) > tolerance * scale + 1e-12:
                    return True
        return False


def digest(tensor: Tensor) -> tuple[float, float] | None:
    """(sum, sum of absolute values), which entries of zero do not change; None without finite numbers."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return None
    total, size = float(tensor.sum(dtype=torch.float64)), float(tensor.abs().sum(dtype=torch.float64))
    return (total, size) if size - size == 0.0 else None
