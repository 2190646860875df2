"""Image sets as tensors on the training device: reading, checking, subset, label noise, normalisation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatprune.errors import InputError
from flatprune.extras import needed_by
from flatprune.files.npz import read_npz
from kfac_ext.curvature.modes import sent

DIGITS = "digits"
KEYS = ("x_train", "y_train", "x_test", "y_test")
SOURCES = (
    (DIGITS, "1,797 grey images of handwritten digits, 8x8, 10 classes", "scikit-learn"),
    ("FILE.npz", "x_train, y_train, x_test, y_test: uint8 or float images [n, h, w, c], integer labels [n]", ""),
)
"""What `--data` takes, what that is, and the package that reads it."""
_DIGITS_TEST_FRACTION = 0.25
_DIGITS_SPLIT_SEED = 0  # fixed: the test set is the same for every --seed
_VALIDATION_SEED = 1
_STRAY_RATIO = 5
MAX_CLASSES = 1_000_000


@dataclass(frozen=True)
class Images:
    """Checked arrays as they were read.

    Attributes:
        name: "digits" or the path of the file.
        x_train, x_test: uint8 or float images [n, height, width, channels].
        y_train, y_test: int64 labels [n] in 0 .. classes - 1.
        classes: number of classes.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: int


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
    """What is trained and tested on: normalised float32 images [n, channels, height, width], int64 labels [n]."""

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int
    normalization: Normalization
    digest: str

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


def read_images(data: str, classes: int | None = None) -> Images:
    """Read and check a data set.

    Args:
        data: "digits" (scikit-learn's 8x8 digits, a fixed stratified split) or the path of an .npz file that holds
            x_train, y_train, x_test, y_test: uint8 (or finite float) images [n, height, width, channels] or
            [n, height, width], and integer labels [n] from 0.
        classes: number of classes; default the largest training label + 1.

    Raises:
        InputError: one line that names the file, the array and what is wrong with it.
    """
    arrays = _digits() if data == DIGITS else read_npz(data, KEYS)
    for split in ("train", "test"):
        x_key, y_key = f"x_{split}", f"y_{split}"
        arrays[x_key] = _checked_images(f"{data}: {x_key}", arrays[x_key])
        arrays[y_key] = _checked_labels(f"{data}: {y_key}", arrays[y_key])
        if len(arrays[x_key]) != len(arrays[y_key]):
            raise InputError(
                f"{data}: {x_key} has {len(arrays[x_key])} images and {y_key} {len(arrays[y_key])} labels, "
                "expected as many labels as images"
            )
    if arrays["x_train"].shape[1:] != arrays["x_test"].shape[1:]:
        raise InputError(
            f"{data}: x_test has images of shape {arrays['x_test'].shape[1:]}, "
            f"x_train of {arrays['x_train'].shape[1:]}; expected the same"
        )
    if (arrays["x_train"].dtype == np.uint8) != (arrays["x_test"].dtype == np.uint8):  # only uint8 is divided by 255
        raise InputError(
            f"{data}: x_test has dtype {arrays['x_test'].dtype}, x_train {arrays['x_train'].dtype}; "
            "expected uint8 in both or floating point in both"
        )
    count = _class_count(data, arrays["y_train"], arrays["y_test"], classes)
    return Images(data, arrays["x_train"], arrays["y_train"], arrays["x_test"], arrays["y_test"], count)


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
        data: "digits" or the path of an .npz file, as in `read_images`.
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
    images = read_images(data, classes)
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
    count = round(fraction * len(labels))
    if count == 0:
        return labels
    result = labels.clone()
    chosen = torch.randperm(len(labels), generator=generator)[:count]
    result[chosen] = torch.randint(classes, (count,), generator=generator)
    return result


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


def _digits() -> dict[str, np.ndarray]:
    with needed_by("the data set 'digits'"):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images[..., None] / 16.0).astype(np.float32)  # grey levels 0 .. 16
    x_train, x_test, y_train, y_test = train_test_split(
        images,
        digits.target.astype(np.int64),
        test_size=_DIGITS_TEST_FRACTION,
        random_state=_DIGITS_SPLIT_SEED,
        stratify=digits.target,
    )
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}


def _checked_images(name: str, images: np.ndarray) -> np.ndarray:
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4:
        raise InputError(f"{name} has shape {images.shape}, expected [n, height, width, channels]")
    if 0 in images.shape:
        raise InputError(f"{name} is empty (shape {images.shape})")
    if images.shape[1] in (1, 3) and images.shape[2] == images.shape[3] > 4:
        raise InputError(f"{name} has shape {images.shape}, channels first; expected [n, height, width, channels]")
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise InputError(f"{name} has dtype {images.dtype}, expected uint8 or floating point")
    with np.errstate(over="ignore"):  # float64 values beyond float32 become infinite
        single = images.astype(np.float32)
    if not np.isfinite(single).all():
        first = np.unravel_index(int(np.argmin(np.isfinite(single))), images.shape)
        raise InputError(f"{name} has a value that is not finite in float32 ({images[first]}) in image {first[0]}")
    return single


def _checked_labels(name: str, labels: np.ndarray) -> np.ndarray:
    if labels.ndim != 1:
        raise InputError(f"{name} has shape {labels.shape}, expected [n]")
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"{name} has dtype {labels.dtype}, expected integers")
    if len(labels) and labels.min() < 0:
        raise InputError(f"{name} has label {labels.min()} at index {int(labels.argmin())}, expected 0 or above")
    if len(labels) and labels.max() > 2**31:
        raise InputError(f"{name} has label {labels.max()} at index {int(labels.argmax())}: out of range")
    return labels.astype(np.int64)


def _class_count(data: str, y_train: np.ndarray, y_test: np.ndarray, classes: int | None) -> int:
    """The number of classes, once every label is known to lie below it."""
    if classes is not None and classes < 2:
        raise InputError(f"classes is {classes}, expected 2 or more")
    count = classes or _plausible_count(data, y_train, y_test)
    for name, labels in (("y_train", y_train), ("y_test", y_test)):
        if labels.max() >= count:
            index = int(labels.argmax())
            raise InputError(f"{data}: {name} has label {labels[index]} at index {index}, expected 0 to {count - 1}")
    if count > MAX_CLASSES:
        raise InputError(f"{data}: has {count:,} classes, expected {MAX_CLASSES:,} or fewer")
    if count < 2:
        raise InputError(f"{data}: y_train has only label {y_train[0]}, expected two classes or more")
    return count


def _plausible_count(data: str, y_train: np.ndarray, y_test: np.ndarray) -> int:
    # One wrong label would otherwise silently make a class (or thousands of them) that no test image has.
    values, counts = np.unique(y_train, return_counts=True)
    top = int(values[-1])
    others = counts[:-1]
    rare = len(others) > 0 and (counts[-1] * _STRAY_RATIO < np.median(others) or top >= 2 * len(values))
    if rare and y_test.max() < top:
        raise InputError(
            f"{data}: y_train has label {top} at index {int(y_train.argmax())}, out of range: only {counts[-1]} of "
            f"{len(y_train)} training labels and no test label is as large (say --classes {top + 1} if it is meant)"
        )
    return top + 1


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
