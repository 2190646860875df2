"""Products of widths: what parameters and multiply-accumulates are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flatprune.coupling.components import Components
from flatprune.coupling.findings import Product
from flatprune.coupling.neurons import NeuronGroup
from flatprune.coupling.values import aligned, varying


class Width(NamedTuple):
    """A size that follows the widths of groups.

    Attributes:
        fixed: entries that no neuron owns.
        per_neuron: (position of a group, entries that each of its neurons owns).
    """

    fixed: int
    per_neuron: tuple[tuple[int, int], ...]

    def at(self, widths: Sequence[int]) -> int:
        """The size with groups of these widths."""
        return self.fixed + sum(count * widths[position] for position, count in self.per_neuron)


class Term(NamedTuple):
    """times a product of widths, divided by `groups` of a grouped convolution.

    Attributes:
        module: whose it is.
        times: a constant factor.
        widths: the factors.
        summed: of multiply-accumulates, position of the factor that is summed over, None if it is constant.
        groups: divides the product.
    """

    module: str
    times: int
    widths: tuple[Width, ...]
    summed: int | None = None
    groups: int = 1

    def value(self, widths: Sequence[int]) -> int:
        """With groups of these widths."""
        product = self.times
        for width in self.widths:
            product *= width.at(widths)
        return product // self.groups

    def outputs(self, widths: Sequence[int], summed_size: int) -> int:
        """What is left after the sum: the results of a product."""
        product = self.times
        for i, width in enumerate(self.widths):
            product *= 1 if i == self.summed else width.at(widths)
        return product if self.summed is not None else product // summed_size


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
        for dim, entries in dims.items():
            size = entries[0][2] if entries[0][3] > 1 or counts == 1 else parameter.shape[dim]
            own = sum(count * groups[position].width for position, count, _, _ in entries)
            widths.append(Width(size - own, tuple((position, count) for position, count, _, _ in entries)))
        constant = math.prod(n for dim, n in enumerate(parameter.shape) if dim not in dims)
        terms.append(Term(name.rpartition(".")[0], constant, tuple(widths), groups=counts))
    return terms


def mac_terms(
    products: Sequence[Product], components: Components, kept: Sequence[int], samples: int
) -> list[tuple[Term, int]]:
    """(term of its multiply-accumulates for one sample, size of the sum) of each product.

    Args:
        products: of one call.
        components: whose candidates the groups are.
        kept: the candidates that became groups, in their order.
        samples: of the call.
    """
    number = torch.full((components.total + 1,), -1, dtype=torch.int64)
    for position, candidate in enumerate(kept):
        number[components.candidates[candidate].labels] = position
    return [(_term(product, components, number, samples), product.size[product.summed]) for product in products]


def _term(product: Product, components: Components, number: Tensor, samples: int) -> Term:
    rank, covered = len(product.size), set()
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
        width = [components_width(components, number, p) for p in positions.tolist()]
        per = tuple((p, c // w) for p, c, w in zip(positions.tolist(), counts.tolist(), width))
        widths.append(Width(int((owner < 0).sum()), per))
    constant = product.times * math.prod(n for d, n in enumerate(product.size) if d not in covered)
    shared = math.gcd(constant, samples)
    return Term(product.module, constant // shared, tuple(widths), summed, samples // shared)


def components_width(components: Components, number: Tensor, position: int) -> int:
    """Neurons of the group at a position."""
    label = int((number == position).nonzero()[0])
    for candidate in components.candidates:
        if bool((candidate.labels == label).any()):
            return candidate.group.width
    raise AssertionError(f"no candidate holds label {label}")
