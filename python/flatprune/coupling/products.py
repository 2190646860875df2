"""What a network costs as products of the widths of its groups: its parameters and multiply-accumulates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flatprune.coupling.components import Components
from flatprune.coupling.findings import Product
from flatprune.coupling.neurons import NeuronGroup, module_of
from flatprune.coupling.terms import Term, Width
from flatprune.coupling.values import aligned, varying


def parameter_terms(model: nn.Module, groups: Sequence[NeuronGroup]) -> list[Term]:
    """One term for each parameter of the model, as it stands."""
    owned: dict[str, dict[int, list[tuple[int, int, int, int]]]] = {}
    for position, group in enumerate(groups):
        for member in group.members:
            entry = (position, member.index.shape[1], member.size, member.groups)
            owned.setdefault(member.name, {}).setdefault(member.dim, []).append(entry)
    terms = []
    for name, parameter in model.named_parameters():
        dims = owned.get(name, {})
        counts = max((entry[3] for entries in dims.values() for entry in entries), default=1)
        widths = []
        for entries in dims.values():
            own = sum(count * groups[position].width for position, count, _, _ in entries)
            per_neuron = tuple((position, count, 1) for position, count, _, _ in entries)
            widths.append(Width(entries[0][2] - own, per_neuron))
        constant = math.prod(n for dim, n in enumerate(parameter.shape) if dim not in dims)
        terms.append(Term(module_of(name), constant, tuple(widths), divisor=counts))
    return terms


def mac_terms(products: Sequence[Product], components: Components, kept: Sequence[int], samples: int) -> list[Term]:
    """The multiply-accumulates of each product for one sample.

    Args:
        products: of one call.
        components: whose candidates the groups are.
        kept: the candidates that became groups, in their order.
        samples: of the call.
    """
    number = torch.full((components.total + 1,), -1, dtype=torch.int64)
    for position, candidate in enumerate(kept):
        number[components.candidates[candidate].labels] = position
    counts = [components.candidates[candidate].group.width for candidate in kept]
    return [_term(product, components, number, counts, samples) for product in products]


def _term(product: Product, components: Components, number: Tensor, neurons: Sequence[int], samples: int) -> Term:
    rank = len(product.size)
    covered: set[int] = set()
    widths: list[Width] = []
    summed = None
    for layer in product.layers:
        layer = aligned(layer, rank)
        dims = varying(layer)
        if not dims or dims & covered:
            continue
        owner = number[torch.where(layer > 0, components.flat(layer), -1)].flatten()
        if bool((owner < 0).all()):
            continue
        covered |= dims
        summed = len(widths) if product.summed in dims else summed
        positions, counts = owner[owner >= 0].unique(return_counts=True)
        per = tuple((p, *_reduced(c, neurons[p])) for p, c in zip(positions.tolist(), counts.tolist()))
        widths.append(Width(int((owner < 0).sum()), per))
    samples = 1 if product.once else samples
    constant = product.times * math.prod(n for d, n in enumerate(product.size) if d not in covered)
    if summed is None:
        return Term(product.module, constant, tuple(widths), None, product.size[product.summed], samples)
    return Term(product.module, constant, tuple(widths), summed, 1, samples)


def _reduced(entries: int, neurons: int) -> tuple[int, int]:
    shared = math.gcd(entries, neurons)
    return entries // shared, neurons // shared


def owned_fraction(model: nn.Module, groups: Sequence[NeuronGroup]) -> float:
    """The part of the parameters of which some neuron owns an entry: those that could go."""
    marks = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    for member in (member for group in groups for member in group.members):
        mark = marks.get(member.name)
        if mark is None:
            continue
        entries = member.index.unique()
        if member.groups == 1:
            mark.index_fill_(member.dim, entries, True)
        else:
            size = member.size // member.groups
            mark.unflatten(0, (member.groups, -1)).transpose(1, 2)[entries // size, entries % size] = True
    return sum(int(mark.sum()) for mark in marks.values()) / max(1, sum(mark.numel() for mark in marks.values()))
