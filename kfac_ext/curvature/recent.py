"""The last calls of a model in training, kept whole so that they can be made again."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

SAMPLES = 256  # kept, or a batch more
CALLS = 64
BYTES = 256_000_000

_PLAIN = (Tensor, bool, int, float, str, type(None))


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of one call of a model.

    Attributes:
        args, kwargs: positional and keyword arguments, nested as they were.
        samples: how many samples it is of, where that counts.

    Example:
        >>> Call((images,), {"return_features": True})
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    samples: int = 1

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any], batch_dim: int = 0) -> Call:
        """A call as hooks see it, detached; `batch_dim` of its first tensor of so many dimensions counts samples."""
        if not kwargs and all(type(x) is Tensor for x in args):  # the usual call, on every step
            detached: tuple[Any, ...] = tuple(x.detach() for x in args)
            return cls(detached, {}, _samples(detached, batch_dim))
        args, kwargs = tree_map(_detached, (args, dict(kwargs)))
        return cls(args, dict(kwargs), _samples(tree_leaves((args, kwargs)), batch_dim))

    @classmethod
    def from_inputs(cls, inputs: Any, forward: Callable[..., Any]) -> Call:
        """From a tensor, a tuple or list of positional arguments, a dict of keywords, or a `Call`.

        A tuple, list or dict that `forward` does not take so is its one argument.
        """
        if isinstance(inputs, Call):
            return inputs
        if isinstance(inputs, Mapping) and _takes(forward, (), inputs):
            return cls.of((), inputs)
        if isinstance(inputs, (tuple, list)) and _takes(forward, tuple(inputs), {}):
            return cls.of(tuple(inputs), {})
        return cls.of((inputs,), {})

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, nested ones too."""
        return [leaf for leaf in tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Tensor)]

    def run(self, model: nn.Module | Any) -> Any:
        """Make the call again, on copies, to which the model may write."""
        args, kwargs = tree_map(_copied, (self.args, dict(self.kwargs)))
        return model(*args, **kwargs)

    def without_last(self, batch_dim: int = 0) -> Call:
        """The call with one sample fewer, in every tensor that has as many as there are samples."""

        def shorter(leaf: Any) -> Any:
            fits = isinstance(leaf, Tensor) and leaf.dim() > batch_dim and leaf.shape[batch_dim] == self.samples
            return leaf.narrow(batch_dim, 0, self.samples - 1) if fits else leaf

        args, kwargs = tree_map(shorter, (self.args, dict(self.kwargs)))
        return Call(args, kwargs, self.samples - 1)

    @property
    def is_plain(self) -> bool:
        """Whether it is made of tensors, numbers, texts and containers alone, which can be saved."""
        return _is_plain((self.args, dict(self.kwargs)))


class RecentCalls:
    """The newest calls: 256 samples or a batch more, at most 64 calls and 256 MB; the newest is kept in any case.

    Args:
        ranks: that share a batch in equal parts, of which this keeps its own; samples and bytes are those of all.
    """

    def __init__(self, ranks: int = 1) -> None:
        self._ranks = ranks
        self._calls: deque[tuple[Call, int]] = deque()
        self._samples = self._bytes = 0

    def add(self, call: Call) -> None:
        """Keep a call, and let go of the oldest beyond the bounds."""
        size = sum(t.nbytes for t in (call.args if not call.kwargs else call.tensors()) if isinstance(t, Tensor))
        self._calls.append((call, size * self._ranks))
        self._samples += call.samples * self._ranks
        self._bytes += size * self._ranks
        while len(self._calls) > 1 and (
            self._samples - self._calls[0][0].samples * self._ranks >= SAMPLES
            or len(self._calls) > CALLS
            or self._bytes > BYTES
        ):
            oldest, freed = self._calls.popleft()
            self._samples -= oldest.samples * self._ranks
            self._bytes -= freed

    def calls(self) -> tuple[Call, ...]:
        """Oldest first."""
        return tuple(call for call, _ in self._calls)

    def state(self) -> list[dict[str, Any]]:
        """Plain containers and copies of tensors; calls with other things among their arguments are left out."""
        kept = [call for call, _ in self._calls if call.is_plain]
        return [tree_map(_copied, {"args": list(c.args), "kwargs": dict(c.kwargs), "samples": c.samples}) for c in kept]

    @classmethod
    def from_state(cls, state: list[dict[str, Any]], device: torch.device, ranks: int = 1) -> RecentCalls:
        """From `state`."""
        recent = cls(ranks)
        for entry in state:
            moved = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, entry)
            recent.add(Call(tuple(moved["args"]), moved["kwargs"], moved["samples"]))
        return recent


def _takes(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[Any, Any]) -> bool:
    if not all(isinstance(name, str) for name in kwargs):
        return False
    try:
        inspect.signature(forward).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:  # it has no signature
        pass
    return True


def _samples(leaves: Any, batch_dim: int) -> int:
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.dim() > batch_dim:
            return leaf.shape[batch_dim]
    return 1


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _is_plain(value: Any) -> bool:
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(isinstance(key, (str, int)) and _is_plain(inner) for key, inner in value.items())
    return type(value) in _PLAIN or type(value) is nn.Parameter
