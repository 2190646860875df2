"""Runs a network once under a `TorchDispatchMode` in which every tensor carries labels beside its data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flatprune.coupling import algebra
from flatprune.coupling.findings import AxisTable, Findings, storage_key, storage_keys
from flatprune.coupling.notes import Notes
from flatprune.coupling.operators import RULES, Operation, fallback
from flatprune.coupling.operators.schemas import schema_of
from flatprune.coupling.values import Value, canonical, canonical_layers, varying

Taking = Callable[[Tensor], Tensor]  # how a view is taken of its base
_View = tuple[Tensor, Value, Taking]  # base, value of the base then, how to take it


class ModuleStack:
    """The modules whose forwards are running, by name.

    Attributes:
        names: outermost first.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names: list[str] = []
        self._ids: list[int] = []
        self._known: dict[int, str] = {}
        for name, module in model.named_modules():
            self._known.setdefault(id(module), name)

    @property
    def here(self) -> str:
        """The innermost module, "the model" if that is the model itself."""
        return (self.names[-1] if self.names else "") or "the model"

    def clear(self) -> None:
        """Forget what an error has left behind."""
        self.names.clear()
        self._ids.clear()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow all forwards inside; after an error the names still say where it was raised."""
        self.clear()

        def enter(module: nn.Module, _args: Any) -> None:
            if id(module) in self._known:
                self.names.append(self._known[id(module)])
                self._ids.append(id(module))

        def leave(module: nn.Module, _args: Any, _output: Any) -> None:
            if id(module) in self._ids:  # what an exception inside left behind goes too
                while self._ids.pop() != id(module):
                    self.names.pop()
                self.names.pop()

        with ExitStack() as stack:
            stack.callback(nn.modules.module.register_module_forward_pre_hook(enter).remove)
            stack.callback(nn.modules.module.register_module_forward_hook(leave).remove)
            yield


class Chunks(TorchFunctionMode):
    """Takes down what is cut into so many equal pieces, whatever its width: as many must stay in each.

    Operators do not tell it from pieces of a size that the code names. Where the last piece is smaller, as many entries
    of each may go as it has.
    """

    def __init__(self, labels: Tracer) -> None:
        super().__init__()
        self.labels = labels

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function; note what it cuts."""
        kwargs = kwargs or {}
        pieces = func(*args, **kwargs)
        if func in (torch.chunk, Tensor.chunk) and len(pieces) > 1:
            source, where = args[0] if args else kwargs["input"], f"chunk in {self.labels.here}"
            dim = next(d for d in range(source.dim()) if pieces[0].shape[d] != source.shape[d])
            size, fewest = pieces[0].shape[dim], pieces[-1].shape[dim]
            for layer in self.labels.get(source).layers:
                if dim in varying(layer):
                    parts = layer.movedim(dim, 0).split(size)
                    self.labels.findings.slices.append((torch.stack([p[:fewest].flatten() for p in parts]), where))
                    for part in parts:
                        self.labels.findings.pin(part[fewest:], f"the last piece has none beside it ({where})")
        return pieces


class Tracer(TorchDispatchMode):
    """One forward with labels.

    Args:
        model: whose parameters and buffers the axes belong to.
        table: axes that traces share.
        findings: what is found goes there.
        stack: says which module is running.

    Attributes:
        called: names of the modules whose forwards ran.
        read_by_host: modules in whose own code a value decided what runs (`item()`, `nonzero`, ...).
    """

    def __init__(self, model: nn.Module, table: AxisTable, findings: Findings, stack: ModuleStack) -> None:
        super().__init__()
        self.model, self.table, self.findings, self.stack = model, table, findings, stack
        self.called: set[str] = set()
        self.read_by_host: set[str] = set()
        self.op = ""
        self._values: Notes[Value] = Notes("value")
        self._views: Notes[_View] = Notes("view")
        self._storage = storage_keys(table.tensors)

    @property
    def here(self) -> str:
        """The module that is running."""
        return self.stack.here

    @property
    def where(self) -> str:
        """The operator and the module that calls it, as messages name them."""
        return f"{self.op} in {self.stack.here}"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, then its rule."""
        kwargs = kwargs or {}
        schema = schema_of(func)
        self.op = schema.called
        self.called.update(self.stack.names)
        if self.op in _HOST_READS or schema.host:
            self.read_by_host.add(self.stack.names[-1] if self.stack.names else "")
        operation = Operation(self, func, args, kwargs, self.run(func, args, kwargs))
        self._apply_rule(operation)
        return self.finish(operation)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operator itself."""
        return func(*args, **kwargs)

    def finish(self, op: Operation) -> Any:
        """What the model gets to see of its result."""
        return op.out

    def note_outputs(self, output: Any) -> None:
        """What the model returns cannot go."""
        self.op = "output"
        for tensor in tensor_leaves(output):
            value = self.get(tensor)
            for layer in value.layers:
                self.findings.pin(layer, "it is an output of the model")
                self.findings.outputs.append(layer.unique())
            algebra.refuse_statistics(self, value)

    def _apply_rule(self, operation: Operation) -> None:
        rule = RULES.get(operation.name)
        known = [self.get(t) for t in operation.tensors]
        if not any(v.layers or v.stats or v.loose for v in known) and not getattr(rule, "always", False):
            free = all(v.free for v in known) or operation.makes_anew
            for tensor in operation.outputs:
                self.put(tensor, Value(tuple(tensor.shape), free=free))
            return
        result = fallback(operation) if rule is None else rule(operation)
        outputs = operation.outputs[:1] if operation.in_place else operation.outputs
        results = result if isinstance(result, list) else [result]
        for i, tensor in enumerate(outputs):
            self.put(tensor, results[i] if i < len(results) else Value(tuple(tensor.shape)))

    # values of tensors

    def get(self, tensor: Tensor) -> Value:
        """What is known of a tensor; a view follows what has been written to its base."""
        value = self._values.get(tensor)
        if value is None:
            key = id(tensor) if id(tensor) in self.table.names else self._storage.get(storage_key(tensor))
            value = Value(tuple(tensor.shape)) if key is None or tensor.numel() == 0 else self._leaf(key, tensor)
            self._values.put(tensor, value, made_here=False)
        view = self._views.get(tensor)
        if view is not None:
            base, seen, take = view
            now = self.get(base)
            if now is not seen:
                value = algebra.moved(now, take, tensor.shape)
                self._values.put(tensor, value)
                self._views.put(tensor, (base, now, take))
        return value

    def put(self, tensor: Tensor, value: Value) -> None:
        """Note what is known of a tensor that is new or was written to; a view writes through to its base."""
        if tuple(value.size) != tuple(tensor.shape):
            raise AssertionError(f"{self.where}: labels of {value.size} for a tensor of {tuple(tensor.shape)}")
        for layer in value.layers:
            self.findings.grid(layer, self.where)
        old, view = self._values.get(tensor), self._views.get(tensor)
        self._values.put(tensor, value, made_here=id(tensor) not in self.table.names)
        if view is not None and old is not None and not _same_labels(old, value):
            self._write_through(tensor, value, view)

    def note_view(self, view: Tensor, base: Tensor, value: Value, take: Taking) -> None:
        """`view` shares memory with `base`, whose value is `value`."""
        self._views.put(view, (base, value, take))

    def _write_through(self, tensor: Tensor, value: Value, view: _View) -> None:
        base, _, take = view
        under = self.get(base)
        layers = []
        for i in range(max(len(under.layers), len(value.layers))):
            full = torch.zeros(under.size, dtype=torch.int64)
            if i < len(under.layers):
                full.copy_(under.layers[i].expand(under.size))
            if i < len(value.layers):
                take(full).copy_(value.layers[i].expand(value.size))
            layers.append(self._united_places(full, under, value, i, take))
        now = Value(
            under.size, canonical_layers(layers), free=under.free and value.free, stats=under.stats | value.stats
        )
        self._views.put(tensor, (base, now, take))
        self.put(base, now)

    def _united_places(self, full: Tensor, under: Value, value: Value, i: int, take: Taking) -> Tensor:
        """A layer that is written in part: labels that differ only between what is written and what is not are one."""
        found = canonical(full)
        if found is None or i >= len(under.layers) or i >= len(value.layers):
            return full
        written = torch.zeros_like(full)
        take(written).copy_(value.layers[i].expand(value.size))
        own = canonical(written)
        allowed = varying(under.layers[i]) | (set() if own is None else varying(own))
        for d in varying(found) - allowed:
            first = found.amax(d, keepdim=True)
            self.findings.edge(first, found, self.where)
            found = first
        return found.expand(full.shape)

    def _leaf(self, key: int, tensor: Tensor) -> Value:
        """A parameter or buffer: one layer for each dimension."""
        layers = []
        for d, n in enumerate(tensor.shape):
            if n > 1:
                shape = [n if e == d else 1 for e in range(tensor.dim())]
                layers.append(self.table.axis(key, d, n).labels().view(shape))
        return Value(tuple(tensor.shape), tuple(layers), param=True)

    def parameter_key(self, tensor: Tensor) -> int | None:
        """The id of the parameter or buffer that this tensor is, or None."""
        return id(tensor) if id(tensor) in self.table.names else self._storage.get(storage_key(tensor))


_HOST_READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item"}


def _same_labels(old: Value, new: Value) -> bool:
    return len(old.layers) == len(new.layers) and all(
        a is b or (a.shape == b.shape and torch.equal(a, b)) for a, b in zip(old.layers, new.layers)
    )


def tensor_leaves(output: Any) -> list[Tensor]:
    """All tensors of what a model returns: tensors, tuples, dicts, dataclasses (Hugging Face's outputs), nested."""
    if hasattr(output, "__dataclass_fields__"):
        output = dict(vars(output))
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [tensor for item in output for tensor in tensor_leaves(item)]
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
