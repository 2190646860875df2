"""How a state of an optimizer lies along its parameter: along which of its dimensions, each entry once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from enum import Enum
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_leaves_with_path

from flatprune.coupling import Cut, cut_tensor

Layout = tuple[int, ...]  # the parameter's dimension along each dimension of a state, WHOLE where it has one entry
WHOLE = -1
FLAT: Layout = (-2,)  # all entries of the parameter in a row

_QUANTISED = {torch.uint8, torch.int8} | {getattr(torch, name) for name in dir(torch) if name.startswith("float8")}
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Generator, Enum)


class NotCuttableError(ValueError):
    """A state that does not lie along its parameter; the message says what it is."""


def layouts(state: Sequence[int], parameter: Sequence[int]) -> list[Layout]:
    """All ways in which a state of one shape can lie along a parameter of another; none if it does not.

    Example:
        >>> layouts((8, 1), (8, 4)), layouts((8,), (8, 8)), layouts((32,), (8, 4)), layouts((8, 8), (8, 4))
        ([(0, -1)], [(0,), (1,)], [(-2,)], [])
    """
    count, size = len(state), tuple(state)
    numel = torch.Size(size).numel()
    if numel == 1:
        return [(WHOLE,) * count]
    found = [
        tuple(d if size[i] == parameter[d] else WHOLE for i, d in enumerate(dims))
        for dims in combinations(range(len(parameter)), count)
        if all(size[i] == parameter[d] or (size[i] == 1 and count == len(parameter)) for i, d in enumerate(dims))
    ]
    if not found and count == 1 and numel == torch.Size(tuple(parameter)).numel():
        return [FLAT]
    return list(dict.fromkeys(found))


def tensors_in(entry: Any) -> list[tuple[str, Any]]:
    """(path, leaf) of everything in an entry of a state that is no plain number or text: tensors, and other objects."""
    leaves = tree_leaves_with_path(entry)
    return [(keystr(path), leaf) for path, leaf in leaves if not isinstance(leaf, _PLAIN) and not callable(leaf)]


def chosen_layout(leaf: Any, parameter: Sequence[int], dims: Iterable[int], seen: Set[Layout] = frozenset()) -> Layout:
    """The layout of a tensor in a state, as far as cuts along these dimensions have to know it.

    Args:
        leaf: a tensor of the state.
        parameter: the shape of its parameter.
        dims: the dimensions that are cut.
        seen: where several fit, the ones that a rehearsal has shown (`flatprune.cutting.rehearsal`).

    Raises:
        NotCuttableError: it is no plain tensor, is quantised, has another shape, or may lie in several ways.
    """
    if type(leaf) not in (Tensor, torch.nn.Parameter):
        raise NotCuttableError(f"is of type {type(leaf).__name__}, expected a tensor")
    shape, expected = tuple(leaf.shape), tuple(parameter)
    if leaf.numel() > 1 and leaf.dtype in _QUANTISED:
        raise NotCuttableError(f"is quantised ({str(leaf.dtype).removeprefix('torch.')}), in blocks that cannot be cut")
    possible = layouts(shape, expected)
    if not possible:
        raise NotCuttableError(f"has shape {shape}, expected {expected} or some of its dimensions")
    cut = set(dims)
    alike = {tuple(d if d in cut or layout == FLAT else WHOLE for d in layout): layout for layout in possible}
    if len(alike) > 1:
        alike = {key: layout for key, layout in alike.items() if layout in seen} or alike
    if len(alike) > 1:
        raise NotCuttableError(f"has shape {shape}, which may be several of the dimensions of {expected}")
    return next(iter(alike.values()))


def cuts_along(layout: Layout, cuts: Sequence[Cut]) -> list[Cut]:
    """What stays of a state, by its own dimensions, when so much stays of its parameter; not for FLAT ones.

    Raises:
        NotCuttableError: the inputs of a grouped convolution go, others from each group, and the state does not tell
            the groups apart.
    """
    own = []
    for cut in cuts:
        if cut.dim not in layout:
            continue
        if cut.groups > 1 and layout[:2] != (0, 1):
            raise NotCuttableError("does not tell the groups of the convolution apart")
        own.append(cut._replace(dim=layout.index(cut.dim)))
    return own


def cut_state(state: Tensor, layout: Layout, parameter: Sequence[int], cuts: Sequence[Cut]) -> Tensor:
    """A new tensor with what stays of a state; the state itself if all does.

    Raises:
        NotCuttableError: see `cuts_along`.
    """
    if layout == FLAT:
        return cut_tensor(state.reshape(tuple(parameter)), cuts).flatten()
    own = cuts_along(layout, cuts)
    return cut_tensor(state, own) if own else state


def refusal(name: str, label: str, error: NotCuttableError) -> ValueError:
    """The error that names a parameter, what is kept of it, why that cannot be cut, and what to do."""
    return ValueError(
        f"{name}: {label} {error}; prune with an optimizer whose states can be cut (SGD, AdamW, Muon, Adafactor, ...), "
        "or exclude the layers that it trains"
    )
