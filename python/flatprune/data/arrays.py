"""Checks of arrays of images and labels."""

from __future__ import annotations

import numpy as np

from flatprune.errors import InputError

MAX_CLASSES = 1_000_000
_STRAY_RATIO = 5


def checked_images(name: str, images: np.ndarray) -> np.ndarray:
    """Images [n, height, width, channels], uint8 or float32; `name` begins the message of an InputError."""
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


def checked_labels(name: str, labels: np.ndarray) -> np.ndarray:
    """Labels [n] or [n, ...] as int64, from 0; `name` begins the message of an InputError."""
    if labels.ndim == 0 or 0 in labels.shape[1:]:
        raise InputError(f"{name} has shape {labels.shape}, expected [n], or [n, ...] for a label at each place")
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"{name} has dtype {labels.dtype}, expected integers")
    if len(labels) and labels.min() < 0:
        raise InputError(
            f"{name} has label {labels.min()} at index {_index(labels, labels.argmin())}, expected 0 or above"
        )
    if len(labels) and labels.max() > 2**31:
        raise InputError(f"{name} has label {labels.max()} at index {_index(labels, labels.argmax())}: out of range")
    return labels.astype(np.int64)


def _index(labels: np.ndarray, place: np.intp) -> int | tuple[int, ...]:
    """Where in the array its flat `place` is."""
    return int(place) if labels.ndim == 1 else tuple(map(int, np.unravel_index(place, labels.shape)))


def class_count(data: str, y_train: np.ndarray, y_test: np.ndarray, classes: int | None) -> int:
    """The number of classes, once every label is known to lie below it."""
    if classes is not None and classes < 2:
        raise InputError(f"classes is {classes}, expected 2 or more")
    count = classes or _plausible_count(data, y_train, y_test)
    for name, labels in (("y_train", y_train), ("y_test", y_test)):
        if labels.max() >= count:
            index = _index(labels, labels.argmax())
            raise InputError(f"{data}: {name} has label {labels[index]} at index {index}, expected 0 to {count - 1}")
    if count > MAX_CLASSES:
        raise InputError(f"{data}: has {count:,} classes, expected {MAX_CLASSES:,} or fewer")
    if count < 2:
        raise InputError(f"{data}: y_train has only label {y_train.flat[0]}, expected two classes or more")
    return count


def _plausible_count(data: str, y_train: np.ndarray, y_test: np.ndarray) -> int:
    # One wrong label would otherwise silently make a class (or thousands of them) that no test image has.
    values, counts = np.unique(y_train, return_counts=True)
    top = int(values[-1])
    others = counts[:-1]
    rare = len(others) > 0 and (counts[-1] * _STRAY_RATIO < np.median(others) or top >= 2 * len(values))
    if rare and y_test.max() < top:
        raise InputError(
            f"{data}: y_train has label {top} at index {_index(y_train, y_train.argmax())}, out of range: only "
            f"{counts[-1]} of {y_train.size} training labels and no test label is as large "
            f"(say --classes {top + 1} if it is meant)"
        )
    return top + 1
