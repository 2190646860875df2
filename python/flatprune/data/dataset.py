"""Image sets as tensors on the training device: reading, checking, subset, label noise, normalisation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatprune.data.sources import Images, read_images
from flatprune.errors import InputError
from kfac_ext.curvature.modes import sent

_VALIDATION_SEED = 1


@dataclass(frozen=True)
class Normalization:
    """The map from images to what the network sees; saved with the model.

    x = (p - mean) / std per channel, p = pixel / 255 for uint8 images and the pixel itself for float images, averaged
    over areas to `image_size` x `image_size` first where that is given.

    Attributes:
        mean, std: float32 [channels] of the training set.
        image_size: height and width the images are averaged down to, or None.

    Example:
        >>> model = flatprune.load("runs/demo")
        >>> logits = model(model.normalization(images))  # images: uint8 [n, height, width, channels]
    """

    mean: Tensor
    std: Tensor
    image_size: int | None = None

    def __call__(self, images: np.ndarray | Tensor) -> Tensor:
        """Normalised float32 [n, channels, height, width] of images [n, height, width, channels]."""
        pixels = to_pixels(images, self.image_size)
        if pixels.shape[1] != self.mean.numel():
            raise InputError(f"images have {pixels.shape[1]} channels, expected {self.mean.numel()}")
        mean, std = (value.to(pixels.device).view(1, -1, 1, 1) for value in (self.mean, self.std))
        return pixels.sub_(mean).div_(std)

    def state_dict(self) -> dict[str, Any]:
        """Plain values for `model.pt`."""
        return {"mean": self.mean, "std": self.std, "image_size": self.image_size}


@dataclass(frozen=True)
class Dataset:
    """What is trained and tested on: normalised float32 images [n, channels, height, width], int64 labels [n, ...]."""

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int
    normalization: Normalization
    digest: str
    class_names: tuple[str, ...] | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        channels, height, width = self.x_train.shape[1:]
        return channels, height, width


def to_pixels(images: np.ndarray | Tensor, image_size: int | None = None) -> Tensor:
    """Images [n, height, width, channels] as new float32 [n, channels, height, width]; uint8 is divided by 255."""
    tensor = torch.as_tensor(images)
    whole = tensor.dtype == torch.uint8
    pixels = tensor.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    if whole:
        pixels.div_(255.0)
    if image_size is not None and tuple(pixels.shape[2:]) != (image_size, image_size):
        pixels = torch.nn.functional.adaptive_avg_pool2d(pixels, image_size)
    return pixels


def load_dataset(
    data: str,
    *,
    seed: int = 0,
    train_size: float | None = None,
    validation: float | None = None,
    label_noise: float = 0.0,
    image_size: int | None = None,
    classes: int | None = None,
    device: torch.device | str = "cpu",
) -> Dataset:
    """The data set named, ready for training.

    Args:
        data: what `read_images` reads.
        seed: draws the subset and the noise (not the digits' split).
        train_size: number of training images, or (below 1) a fraction of them, a random subset; default all.
        validation: fraction of the training images, the same for every seed, that takes the place of the test images;
            their labels stay as they are. The subset is drawn from the others.
        label_noise: fraction of the training labels that are drawn anew, uniformly over all classes (so that about
            1 / classes of them come out as they were).
        image_size: average the images over areas down to image_size x image_size.
        classes: number of classes; default the largest training label + 1.
        device: where the tensors live.

    Raises:
        InputError: naming what cannot be used.
    """
    images = read_images(data, classes, image_size)
    if validation is not None:
        images = _held_out(images, validation)
    height, width = images.x_train.shape[1:3]
    if image_size is not None and not 1 <= image_size <= min(height, width):
        raise InputError(
            f"image_size is {image_size}, expected 1 to {min(height, width)} for images of {height}x{width}"
        )
    if not 0.0 <= label_noise <= 1.0:
        raise InputError(f"label_noise is {label_noise}, expected 0 to 1")
    generator = torch.Generator().manual_seed(seed)
    index = _subset(data, len(images.x_train), train_size, generator)
    y_train = noisy_labels(torch.from_numpy(images.y_train)[index], images.classes, label_noise, generator)
    pixels = to_pixels(images.x_train[index.numpy()], image_size)
    std, mean = torch.std_mean(pixels, dim=(0, 2, 3), correction=0)
    if bool((std == 0).any()):
        channel = int((std == 0).nonzero()[0])
        raise InputError(f"{data}: x_train: channel {channel} has the same value everywhere, nothing to learn from")
    normalization = Normalization(mean, std, image_size)
    del pixels
    x_train = normalization(images.x_train[index.numpy()])
    x_test = normalization(images.x_test)
    return Dataset(
        name=data,
        x_train=x_train.to(device),
        y_train=y_train.to(device),
        x_test=x_test.to(device),
        y_test=torch.from_numpy(images.y_test).to(device),
        classes=images.classes,
        normalization=normalization,
        digest=_digest(x_train, y_train, x_test),
        class_names=images.class_names,
    )


def _held_out(images: Images, fraction: float) -> Images:
    """The same images with a fraction of the training set, picked by a fixed seed, in the place of the test set."""
    order = np.random.default_rng(_VALIDATION_SEED).permutation(len(images.x_train))
    count = round(fraction * len(order))
    if not 0 < count < len(order):
        raise InputError(f"validation is {fraction}: it leaves no image of {len(order)} to test or to train on")
    tested, trained = order[:count], order[count:]
    return replace(
        images,
        x_train=images.x_train[trained],
        y_train=images.y_train[trained],
        x_test=images.x_train[tested],
        y_test=images.y_train[tested],
    )


def noisy_labels(labels: Tensor, classes: int, fraction: float, generator: torch.Generator) -> Tensor:
    """Labels of which round(fraction * n), picked at random, are drawn anew uniformly from 0 .. classes - 1."""
    count = round(fraction * labels.numel())
    if count == 0:
        return labels
    result = labels.flatten().clone()
    chosen = torch.randperm(labels.numel(), generator=generator)[:count]
    result[chosen] = torch.randint(classes, (count,), generator=generator)
    return result.view_as(labels)


def batch_indices(order: Tensor, batch_size: int, start: int = 0) -> Iterator[Tensor]:
    """Index batches of equal size along `order`, from batch number `start`; an incomplete last one is left out."""
    size = min(batch_size, len(order))
    for batch in range(start, len(order) // size):
        yield order[batch * size : (batch + 1) * size]


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random shift of up to 1/8 of the size (zeros move in), and for colour images a random mirror image.

    Args:
        images: normalised [n, channels, height, width].
        generator: a CPU generator.
    """
    n, channels, height, width = images.shape
    device = images.device
    pad_y, pad_x = max(1, height // 8), max(1, width // 8)
    padded = torch.nn.functional.pad(images, (pad_x, pad_x, pad_y, pad_y))
    shift_y = sent(torch.randint(2 * pad_y + 1, (n, 1), generator=generator), device)
    shift_x = sent(torch.randint(2 * pad_x + 1, (n, 1), generator=generator), device)
    rows = shift_y + torch.arange(height, device=device)
    columns = shift_x + torch.arange(width, device=device)
    if channels == 3:  # grey images are mostly signs, and a mirrored sign is another sign
        mirrored = sent(torch.rand((n, 1), generator=generator), device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    sample = torch.arange(n, device=device).view(n, 1, 1, 1)
    channel = torch.arange(channels, device=device).view(1, channels, 1, 1)
    return padded[sample, channel, rows.view(n, 1, height, 1), columns.view(n, 1, 1, width)]


def _subset(data: str, available: int, train_size: float | None, generator: torch.Generator) -> Tensor:
    if train_size is None:
        return torch.arange(available)
    size = max(1, round(train_size * available)) if train_size < 1.0 else int(train_size)
    if not 1 <= size <= available:
        raise InputError(
            f"train_size is {train_size}, expected 1 to {available} ({data} has {available} training images)"
        )
    return torch.randperm(available, generator=generator)[:size]


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
