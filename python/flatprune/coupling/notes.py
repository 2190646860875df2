"""Notes that a run of a network keeps beside its tensors, gone with them."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from torch import Tensor

Noted = TypeVar("Noted")


class Notes(Generic[Noted]):
    """Tensor -> note, by identity.

    Notes on tensors that a run makes lie in their `__dict__`, which outlives the Python object where only C++ holds the
    tensor, and costs a tenth of a weak dictionary. Those of others, such as parameters, lie here.

    Args:
        name: of the entry in `__dict__`.
    """

    def __init__(self, name: str) -> None:
        self._name, self._token = f"_flatprune_{name}", object()
        self._others: dict[int, tuple[Tensor, Noted]] = {}

    def get(self, tensor: Tensor) -> Noted | None:
        """The note, None without."""
        other = self._others.get(id(tensor))
        if other is not None:
            return other[1]
        found: Any = tensor.__dict__.get(self._name)
        return found[1] if found is not None and found[0] is self._token else None

    def put(self, tensor: Tensor, note: Noted, *, made_here: bool = True) -> None:
        """Note something on a tensor; `made_here`: by an operator of this run, so that no one else will see it."""
        if made_here and id(tensor) not in self._others:
            tensor.__dict__[self._name] = self._token, note
        else:
            self._others[id(tensor)] = tensor, note
