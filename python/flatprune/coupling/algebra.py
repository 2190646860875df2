"""What the rules of operators are made of: labels that meet, are summed over, joined or moved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from flatprune.coupling.findings import Product
from flatprune.coupling.labels import Labels
from flatprune.coupling.neurons import CHANNELWISE, CONSUMER, PRODUCER
from flatprune.coupling.values import Value, aligned, canonical, canonical_layers, labels_of, varying

Size = Sequence[int]


def unify(m: Labels, a: Tensor, a_size: Size, b: Tensor, b_size: Size) -> Tensor:
    """Two layers that meet elementwise are one; where one is broadcast over the other, softly so."""
    only_a, only_b = varying(a) - varying(b), varying(b) - varying(a)
    if only_a and not only_b:
        a, a_size, b, b_size, only_a, only_b = b, b_size, a, a_size, only_b, only_a
    soft = bool(only_b) and not only_a and all(a_size[d] == 1 for d in only_b)
    m.findings.edge(a, b, m.where, soft=soft)
    a, b = torch.broadcast_tensors(a, b)
    united = canonical(torch.where(b > 0, b, a))
    assert united is not None
    return united


class _Slot:
    """Layers of several operands that are one layer of the result."""

    def __init__(self, layer: Tensor, size: Size, operand: int) -> None:
        self.layer, self.size, self.operands = layer, tuple(size), {operand}

    def add(self, m: Labels, layer: Tensor, size: Size, operand: int) -> None:
        self.layer = unify(m, self.layer, self.size, layer, size)
        self.size = tuple(map(max, self.size, size))
        self.operands.add(operand)


def combine(m: Labels, values: Sequence[Value], size: Size, *, discharge: bool = True) -> Value:
    """Elementwise, with broadcasting: layers that vary along a common dimension are one.

    An operand that is full size along all dimensions of a layer without labels of its own pins it; along some of them,
    the slices that it holds must stay equally large. A single label that is a factor of all entries pins its neuron.
    """
    size, rank = tuple(size), len(size)
    sizes = [_own_size(value, rank) for value in values]
    slots: list[_Slot] = []
    constant: list[tuple[Tensor, int]] = []
    for i, value in enumerate(values):
        for layer in (aligned(layer, rank) for layer in value.layers):
            if not varying(layer):
                constant.append((layer, i))
                continue
            for slot in slots:
                if varying(slot.layer) & varying(layer) and i not in slot.operands:
                    slot.add(m, layer, sizes[i], i)
                    break
            else:
                slots.append(_Slot(layer, sizes[i], i))
    layers = [slot.layer for slot in slots]
    for layer in layers:
        _check_partners(m, layer, values, sizes)
    for layer, i in constant:
        if any(i not in slot.operands for slot in slots):
            m.findings.pin(layer, f"a single channel of it is a factor of others ({m.where})")
        elif layers and not varying(layers[-1]):
            m.findings.edge(layers[-1], layer, m.where)
        else:
            layers.append(layer)
    if any(not v.param and not v.free for v in values):
        for value in values:
            note_role(m, value, CHANNELWISE)
    stats = frozenset().union(*(v.stats for v in values))
    if discharge and stats:
        stats = _used_up(m, values, stats)
    loose = {d - rank for d in range(rank) if all(n[d] == 1 for v, n in zip(values, sizes) if not v.free)}
    return Value(
        size,
        tuple(layers),
        free=all(v.free for v in values) and not layers,
        param=any(v.param for v in values) and all(v.param or v.free for v in values),
        stats=stats,
        loose=frozenset(d for d in loose if size[d] > 1),
    )


def _own_size(value: Value, rank: int) -> Size:
    """Its size with leading ones; dimensions that an expand made count as 1."""
    size = (1,) * (rank - value.rank) + tuple(value.size)
    return tuple(1 if d - rank in value.loose else n for d, n in enumerate(size))


def _check_partners(m: Labels, layer: Tensor, values: Sequence[Value], sizes: Sequence[Size]) -> None:
    """Pin a layer beside operands without labels along its dimensions; where they hold some of these, note slices."""
    rank = layer.dim()
    held = set()
    for value, size in zip(values, sizes):
        if not value.free:
            own = set().union(*(varying(aligned(x, rank)) for x in value.layers))
            held |= {d for d in varying(layer) if size[d] > 1 and d not in own}
    if held and held == varying(layer):
        m.findings.pin(layer, f"it meets something of its width that cannot be cut, an input or a constant ({m.where})")
    elif held:
        order = sorted(held) + [d for d in range(rank) if d not in held]
        slices = math.prod(layer.shape[d] for d in held)
        m.findings.slices.append((layer.permute(order).reshape(slices, -1), m.where))


def note_role(m: Labels, value: Value, role: str, dims: set[int] | None = None) -> None:
    """A parameter's layers (those that vary along `dims`) take a role."""
    for layer in value.layers if value.param else ():
        if dims is None or varying(layer) & dims:
            m.findings.roles.append((layer, role))


def _used_up(m: Labels, values: Sequence[Value], stats: frozenset[int]) -> frozenset[int]:
    """x_c f(mean of x over c) is a norm over channels, written by hand: that statistic is accounted for."""
    left = set()
    for s in stats:
        labels, where = m.findings.statistics[s]
        others = [layer for v in values if s not in v.stats for layer in v.layers]
        if any(bool(torch.isin(layer[layer > 0], labels).all()) for layer in others):
            m.findings.joint_norms.append((labels, where))
        else:
            left.add(s)
    return frozenset(left)


def refuse_statistics(m: Labels, *values: Value) -> None:
    """A statistic over channels that meets other things than these channels: they cannot go."""
    for value in values:
        for s in value.stats:
            labels, where = m.findings.statistics[s]
            m.findings.pin(labels, f"its channels are mixed by {where}")


def reduce(m: Labels, value: Value, dims: Iterable[int], *, keep: bool, statistic: bool) -> Value:
    """A sum (or `statistic`: a mean, a norm, a maximum) over dimensions.

    Of labels that vary along some of them only, a new label is left for each remaining entry: the scores of a head.
    """
    rank = value.rank
    dims = {d % rank for d in dims} if rank else set()
    layers, stats = [], set(value.stats)
    for layer in value.layers:
        over = varying(layer) & dims
        if over and statistic:
            m.findings.statistics.append((labels_of(layer), m.where))
            stats.add(len(m.findings.statistics) - 1)
        if over and not statistic:
            m.findings.read.append(labels_of(layer))
        if over and over == varying(layer):
            continue
        if over:
            left = _joint_labels(m, layer, dims)
            m.findings.edge(left, layer, m.where, soft=True)
            layer = left
        layers.append(layer)
    kept = [d for d in range(rank) if d not in dims or keep]
    size = tuple(1 if d in dims else value.size[d] for d in kept)
    reduced = tuple(layer.reshape([1 if d in dims else layer.shape[d] for d in kept]) for layer in layers)
    return Value(size, reduced, free=value.free, param=value.param, stats=frozenset(stats))


def _joint_labels(m: Labels, layer: Tensor, dims: set[int]) -> Tensor:
    """A new label for each entry that a sum over `dims` leaves; entries that sum over the same labels share one."""
    kept = [d for d in range(layer.dim()) if d not in dims]
    rows = layer.permute(kept + sorted(dims)).reshape(math.prod(layer.shape[d] for d in kept), -1)
    different, which = rows.unique(dim=0, return_inverse=True)
    labels = m.table.joint(different)[which]
    left = canonical(labels.view([1 if d in dims else n for d, n in enumerate(layer.shape)]))
    assert left is not None
    return left


def contract(m: Labels, a: Value, b: Value, k: int, times: int = 1) -> Value:
    """Multiply and sum over dimension k; both are given in the rank of their product.

    A parameter's layer along k reads (consumer), its others make (producer). It is done `times` times.
    """
    refuse_statistics(m, a, b)
    size = tuple(map(max, a.size, b.size))
    others = set(range(len(size))) - {k}
    once = _sees_no_samples(a) and _sees_no_samples(b)
    m.findings.products.append(Product(m.here, times, size, [*a.layers, *b.layers], k, once))
    for value in (a, b):
        note_role(m, value, CONSUMER, {k})
        note_role(m, value, PRODUCER, others)
        if not value.param:
            m.findings.read += [labels_of(layer) for layer in value.layers if k in varying(layer)]
    plain = [value.having(param=False, stats=frozenset(), loose=frozenset()) for value in (a, b)]
    product = combine(m, plain, size, discharge=False)
    return reduce(m, product, [k], keep=False, statistic=False).having(param=a.param and b.param)


def _sees_no_samples(value: Value) -> bool:
    """Made of parameters of which no entry is repeated, as queries are for each sample."""
    along: list[list[Tensor]] = [[] for _ in value.size]
    for layer in value.layers if value.param else ():
        if len(varying(layer)) == 1:
            along[varying(layer).pop()].append(layer.flatten())
    entries = [torch.stack(layers).unique(dim=1).shape[1] if layers else 1 for layers in along]
    return value.param and entries == list(value.size)


def collapsed(m: Labels, value: Value, dims: Iterable[int], why: str = "its entries are mixed by") -> Value:
    """Before an operator that mixes positions: labels that differ over `dims` become one, or cannot go."""
    dims, layers = {d % value.rank for d in dims} if value.rank else set(), []
    for layer in value.layers:
        over = varying(layer) & dims
        if over and over == varying(layer):
            m.findings.pin(layer, f"{why} {m.where}")
            continue
        for d in over:
            first = layer.amax(d, keepdim=True)
            m.findings.edge(first, layer, m.where)
            layer = first
        layers.append(layer)
    return value.having(layers=tuple(layers), loose=frozenset())


def refused_along(m: Labels, value: Value, dims: Iterable[int], why: str = "its channels are mixed by") -> Value:
    """Labels that differ along `dims` cannot go."""
    dims, layers = {d % value.rank for d in dims} if value.rank else set(), []
    for layer in value.layers:
        if varying(layer) & dims:
            m.findings.pin(layer, f"{why} {m.where}")
        else:
            layers.append(layer)
    return value.having(layers=tuple(layers), loose=frozenset())


def moved(value: Value, take: Callable[[Tensor], Tensor], shape: Size) -> Value:
    """The same movement on the labels."""
    layers = []
    for layer in value.layers:
        full = layer.expand(value.size)
        try:
            new = take(full)
        except RuntimeError:  # not for integers, or a view that an expanded tensor does not allow
            new = take(full.contiguous().double()).long()
        layers.append(new)
    return Value(tuple(shape), canonical_layers(layers), free=value.free, param=value.param, stats=value.stats)


def joined(m: Labels, values: Sequence[Value], dim: int, size: Size) -> Value:
    """Concatenation along `dim`: other layers are one."""
    rank = len(size)
    dim %= rank
    layers = []
    slots = _joined_slots(values, dim)
    apart = any(dim in varying(layer) for slot in slots for layer in slot.values())
    for slot in slots:
        if apart and len(slot) < len(values) and not any(map(varying, slot.values())):
            for layer in slot.values():  # of all of an operand, beside labels of its entries
                m.findings.pin(layer, f"a single entry of it is joined with others ({m.where})")
            continue
        if any(dim in varying(layer) or not varying(layer) for layer in slot.values()):
            shape = [max(layer.shape[d] for layer in slot.values()) for d in range(rank)]
            pieces = []
            for i, value in enumerate(values):
                piece = slot.get(i, torch.full((1,) * rank, 0 if value.free else -1))
                pieces.append(piece.expand([value.size[dim] if d == dim else n for d, n in enumerate(shape)]))
            layers.append(canonical(torch.cat(pieces, dim)))
            continue
        first, *rest = slot.values()
        for other in rest:
            first = unify(m, first, size, other, size)
        if any(i not in slot and not value.free for i, value in enumerate(values)):
            m.findings.pin(first, f"it is joined with an input or a constant ({m.where})")
        else:
            layers.append(first)
    if not all(value.param for value in values):
        for value in values:
            note_role(m, value, CHANNELWISE)
    stats = frozenset().union(*(value.stats for value in values))
    kept = tuple(layer for layer in layers if layer is not None)
    return Value(tuple(size), kept, free=all(value.free for value in values), stats=stats)


def _joined_slots(values: Sequence[Value], dim: int) -> list[dict[int, Tensor]]:
    """Which layers of the operands belong together: operand -> layer."""
    slots: list[dict[int, Tensor]] = []
    for i, value in enumerate(values):
        for layer in value.layers:
            alike, along = [], []
            for slot in (slot for slot in slots if i not in slot):
                other = varying(next(iter(slot.values())))
                if other & varying(layer):
                    alike.append(slot)
                elif other | varying(layer) <= {dim}:  # one label beside several
                    along.append(slot)
            if alike or along:
                (alike or along)[0][i] = layer
            else:
                slots.append({i: layer})
    return slots
