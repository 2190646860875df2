"""The batches of a step: gathered on the device, augmented, mixed, split into parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flatprune.data import augmented
from flatprune.errors import InputError
from flatprune.settings import Settings
from kfac_ext.curvature.modes import sent


class Batch(NamedTuple):
    """Images and what to learn of them.

    Attributes:
        x: images [n, channels, height, width].
        target: what the loss is told: labels int64 [n, ...], or fractions of the classes [n, classes, ...].
        labels: int64 [n, ...], the class of the largest fraction.
    """

    x: Tensor
    target: Tensor
    labels: Tensor


class Batches:
    """Makes batches from images and labels on the training device, without a wait for it.

    Args:
        x: images [N, channels, height, width].
        y: labels int64 [N, ...].
        classes: number of classes.
        generator: a CPU generator, of all that is drawn.
        augment: random shifts, and mirror images for colour (`flatprune.data.augmented`).
        mixup: alpha of `mixed`, or 0.
        channels_last: give images in that memory format.
        parts: how many batches of equal size a step's images are split into.
        own_part: of what is drawn for all ranks, what this one takes of each part; None: all of it.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        classes: int,
        generator: torch.Generator,
        *,
        augment: bool,
        mixup: float,
        channels_last: bool,
        parts: int,
        own_part: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._x, self._y, self._classes, self._generator = x, y, classes, generator
        self._own_part = own_part
        self._augment, self._mixup, self._channels_last, self._parts = augment, mixup, channels_last, parts

    def of(self, index: Tensor) -> list[Batch]:
        """The parts of the batch of the images `index` [n], n a multiple of their number."""
        x, y = self._x[index], self._y[index]
        if self._augment:
            x = augmented(x, self._generator)
        batch = Batch(x, y, y)
        if self._mixup > 0.0:
            batch = mixed(x, y, self._classes, self._mixup, self._generator)
        if self._channels_last:
            batch = batch._replace(x=batch.x.contiguous(memory_format=torch.channels_last))
        parts = [Batch(*part) for part in zip(*(tensor.chunk(self._parts) for tensor in batch))]
        return parts if self._own_part is None else [Batch(*map(self._own_part, part)) for part in parts]


def mixed(x: Tensor, y: Tensor, classes: int, alpha: float, generator: torch.Generator) -> Batch:
    """Mixup (Zhang et al. 2018, arXiv 1710.09412): s x + (1 - s) x[p] with the labels' fractions alike.

    p is a random permutation of the batch, s = max(b, 1 - b) and b drawn from Beta(alpha, alpha): which of a pair is
    called the first does not matter, and so y holds the labels of the larger fraction.

    Args:
        x: images [n, ...].
        y: labels int64 [n, ...].
        classes: number of classes.
        alpha: above 0.
        generator: a CPU generator.
    """
    seed = torch.randint(2**63 - 1, (1,), generator=generator).numpy()
    drawn = float(np.random.default_rng(seed).beta(alpha, alpha))
    fraction = max(drawn, 1.0 - drawn)
    other = sent(torch.randperm(len(x), generator=generator), x.device)
    names = torch.arange(classes, device=y.device).view(-1, *[1] * (y.dim() - 1))
    onehot = (y[:, None] == names).to(x.dtype)
    return Batch(fraction * x + (1.0 - fraction) * x[other], fraction * onehot + (1.0 - fraction) * onehot[other], y)


def whole_batch(settings: Settings, images: int, ranks: int = 1) -> int:
    """Images a step, of all ranks: a multiple of the parts it is split into, and no more than there are.

    Raises:
        InputError: ranks and parts do not divide the batch, or would have fewer than 2 images.
    """
    parts = settings.accumulate
    count = parts * ranks
    if settings.batch_size % count:
        raise InputError(
            f"batch_size is {settings.batch_size}, expected a multiple of {count} for {ranks} ranks"
            + (f" and accumulate {parts}" if parts > 1 else "")
        )
    size = min(settings.batch_size, images // count * count)
    if size < 2 * count and count > 1:
        if ranks > 1:
            raise InputError(
                f"{ranks} ranks with accumulate {parts} need {2 * count} training images, there are {images}"
            )
        raise InputError(f"accumulate is {count}, expected {images // 2} or less for {images} training images")
    return size
