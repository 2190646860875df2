"""Products of widths: what parameters and multiply-accumulates are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Width(NamedTuple):
    """A size that follows the widths of groups.

    Attributes:
        fixed: entries that no neuron owns.
        per_neuron: (position of a group, entries, neurons that own so many together: as many as there are slices if all
            have to lose one for an entry to go).
    """

    fixed: int
    per_neuron: tuple[tuple[int, int, int], ...]

    def at(self, widths: Sequence[int]) -> int:
        """The size with groups of these widths."""
        return self.fixed + sum(entries * widths[position] // neurons for position, entries, neurons in self.per_neuron)

    def of_groups(self, positions: Sequence[int], widths: Sequence[int]) -> Width:
        """With these groups alone, renumbered; those of the others keep their widths."""
        kept = tuple((positions.index(p), e, n) for p, e, n in self.per_neuron if p in positions)
        fixed = self.fixed + sum(e * widths[p] // n for p, e, n in self.per_neuron if p not in positions)
        return Width(fixed, kept)


class Term(NamedTuple):
    """A constant times a product of widths.

    Attributes:
        module: whose it is.
        times: the constant.
        widths: the factors.
        summed: of multiply-accumulates, position of the factor that is summed over, None if that is constant.
        summed_size: its size if it is constant, else 1.
        divisor: of the whole: samples, or the groups of a convolution.
    """

    module: str
    times: int
    widths: tuple[Width, ...]
    summed: int | None = None
    summed_size: int = 1
    divisor: int = 1

    def value(self, widths: Sequence[int]) -> int:
        """With groups of these widths."""
        product = self.times
        for width in self.widths:
            product *= width.at(widths)
        return product // self.divisor

    def outputs(self, widths: Sequence[int]) -> int:
        """What is left after the sum: the results of a product."""
        product = self.times // self.summed_size
        for i, width in enumerate(self.widths):
            product *= 1 if i == self.summed else width.at(widths)
        return product // self.divisor

    def of_groups(self, positions: Sequence[int], widths: Sequence[int]) -> Term:
        """With these groups alone, see `Width.of_groups`."""
        return self._replace(widths=tuple(width.of_groups(positions, widths) for width in self.widths))
