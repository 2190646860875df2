"""Schedules by their shapes, with the plain data that kernels read of them on the device."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from kfac_ext.ops._launch import stream_of

Value = TypeVar("Value")

_MOST_BYTES = 64 << 20  # a call's shapes take kilobytes each, so no call alone fills it
_OWN_BYTES = 1 << 10  # of the smallest schedule on the host, about


@dataclass(slots=True)
class _Entry(Generic[Value]):
    value: Value
    tensors: Sequence[Tensor]
    streams: set[int]
    """on which the tensors were allocated or may be read"""
    size: int
    used: int
    """the number of the call that asked for it last"""


class Schedules(Generic[Value]):
    """Keeps what `make(device, key)` gives until much else has been asked for since.

    What a CUDA graph has captured is kept for good, since the graph may be replayed at any time. The memory of what is
    dropped is used again only when the kernels that read it have ended, on every stream that has asked for it.

    Args:
        make: a schedule, from a device, a key, and what else the call has been given.
        tensors: what of it lies on the device.
        most_bytes: kept on all devices, in schedules that no graph has captured.
    """

    def __init__(
        self,
        make: Callable[..., Value],
        tensors: Callable[[Value], Sequence[Tensor]],
        most_bytes: int = _MOST_BYTES,
    ) -> None:
        self._make, self._tensors, self._most_bytes = make, tensors, most_bytes
        self._entries: dict[tuple[torch.device, Hashable], _Entry[Value]] = {}
        self._captured: dict[tuple[torch.device, Hashable], _Entry[Value]] = {}
        self._size = self._calls = 0
        self._lock = threading.RLock()

    def __call__(self, device: torch.device, key: Hashable, *arguments: Any) -> Value:
        """The schedule of a key, made with the arguments if it is new.

        Raises:
            RuntimeError: it is new, lies on the device, and a CUDA graph is being captured.
        """
        place = device, key
        with self._lock:
            self._calls += 1
            # keys of many shapes take long to hash and to compare: they are looked up once
            entry = self._entries.get(place) or self._captured.get(place) or self._add(place, arguments)
            entry.used = self._calls
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing() and place in self._entries:
                self._captured[place] = self._entries.pop(place)
                self._size -= entry.size
            stream = stream_of(device)
            if stream not in entry.streams:
                _tell(entry, device, stream)
            return entry.value

    def cache_clear(self) -> None:
        """Forget what no graph has captured."""
        with self._lock:
            self._entries.clear()
            self._size = 0

    def _add(self, place: tuple[torch.device, Any], arguments: tuple[Any, ...]) -> _Entry[Value]:
        value = self._make(*place, *arguments)
        tensors = self._tensors(value)
        size = _OWN_BYTES + sum(tensor.nbytes for tensor in tensors)
        entry = self._entries[place] = _Entry(value, tensors, {stream_of(place[0])}, size, self._calls)
        self._size += size
        while self._size > self._most_bytes and len(self._entries) > 1:
            oldest, _ = min(self._entries.items(), key=lambda item: item[1].used)
            self._size -= self._entries.pop(oldest).size
        return entry


def _bytes_of(key: Any) -> int:
    """Of a key made of tuples, each part counted as if it were no other's."""
    own = sys.getsizeof(key)
    return own + sum(map(_bytes_of, key)) if isinstance(key, tuple) else own


def _tell(entry: _Entry[Any], device: torch.device, stream: int) -> None:
    """Let PyTorch's allocator wait for this stream, too, before it gives the memory to others."""
    entry.streams.add(stream)
    for tensor in entry.tensors:
        tensor.record_stream(torch.cuda.current_stream(device))
