"""Random numbers for a batch, the same however many ranks share it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kfac_ext.curvature.modes import sent

if TYPE_CHECKING:
    from kfac_ext.distributed import Group

_DRAWN_BY_ALL = 1 << 20  # numbers; more are drawn by each rank for itself


class Draws:
    """What labels and signs are drawn by, one number or row a sample.

    Ranks that share a batch draw the numbers of the whole batch, each from a generator in the same state, and keep
    those of their own rows. Beyond 2^20 numbers a rank draws its own, from a seed of the generator and its place: as
    random, but not the numbers of one process.

    Args:
        generator: on any device.
        group: the ranks that share a batch; None: one process.

    Example:
        >>> Draws(torch.Generator().manual_seed(0)).uniform((2, 1), torch.zeros(2))
    """

    def __init__(self, generator: torch.Generator, group: Group | None = None) -> None:
        self.generator, self.group = generator, group

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers in shape, dtype and place of a tensor [N, ...]."""
        return sent(self._rows(torch.randn, like.shape, dtype=like.dtype), like.device)

    def uniform(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Numbers in [0, 1) of a shape [N, ...], in dtype and place of a tensor."""
        return sent(self._rows(torch.rand, shape, dtype=like.dtype), like.device)

    def signs(self, shape: Sequence[int], like: Tensor, dim: int = 0) -> Tensor:
        """Numbers -1 and 1, in dtype and place of a tensor; samples count along `dim`."""

        def bits(size: Sequence[int], **place: object) -> Tensor:
            return torch.randint(0, 2, tuple(size), dtype=torch.int8, **place)  # type: ignore[call-overload]

        return (sent(self._rows(bits, shape, dim=dim), like.device) * 2 - 1).to(like.dtype)

    def poisson(self, rates: Tensor) -> Tensor:
        """Counts of these rates [N, ...]; how many numbers that takes depends on all of the batch's rates."""
        whole = rates if self.group is None else self.group.rows_of_all(rates, "rates of drawn counts")
        drawn = torch.poisson(whole.to(self.generator.device), generator=self.generator)
        mine = drawn if self.group is None else self.group.own_rows(drawn, 0)
        return mine.to(rates.device)

    def _rows(self, draw: Callable[..., Tensor], shape: Sequence[int], *, dim: int = 0, **kind: object) -> Tensor:
        """Numbers of this shape, of which all ranks' together are those of one process."""
        generator, group = self.generator, self.group
        if group is None:
            return draw(tuple(shape), generator=generator, device=generator.device, **kind)
        whole = [size * (group.size if i == dim else 1) for i, size in enumerate(shape)]
        if torch.Size(whole).numel() > _DRAWN_BY_ALL:
            seed = torch.randint(2**62, (), generator=generator, device=generator.device)
            own = torch.Generator(generator.device).manual_seed((int(seed) + group.rank) % 2**62)
            return draw(tuple(shape), generator=own, device=own.device, **kind)
        return group.own_rows(draw(tuple(whole), generator=generator, device=generator.device, **kind), dim)
