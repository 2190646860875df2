"""What `--data` names, and the checked arrays that are read from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flatprune import named
from flatprune.data.arrays import checked_images, checked_labels, class_count
from flatprune.data.pictures import dataset_files, folder_files, is_dataset, read_dataset, read_folder
from flatprune.data.tables import read_csv
from flatprune.errors import InputError
from flatprune.extras import needed_by
from flatprune.files.npz import read_npz

DIGITS = "digits"
KEYS = ("x_train", "y_train", "x_test", "y_test")
CSV = (".csv", ".tsv")
SOURCES = (
    (DIGITS, "1,797 grey images of handwritten digits, 8x8, 10 classes", "scikit-learn"),
    ("FILE.npz", "x_train, y_train, x_test, y_test: uint8 or float images [n, h, w, c], labels [n, ...] from 0", "-"),
    ("DIR", "images in DIR/train/CLASS and DIR/test/CLASS, or in DIR/CLASS, a fifth of which is held out", "pillow"),
    ("FILE.csv", "a row a sample, numbers, under a header; the class in `label` or the last column", "-"),
    ("DIR", "a data set of Hugging Face's, saved to disk: image and label, parts train and test", "datasets"),
    ("MODULE:FUNCTION", "of your own: gives a dict of the arrays of an .npz, or the four in that order", "-"),
)
"""What `--data` takes, what that is, and the package that reads it."""
_DIGITS_TEST_FRACTION = 0.25
_DIGITS_SPLIT_SEED = 0  # fixed: the test set is the same for every --seed


@dataclass(frozen=True)
class Images:
    """Checked arrays as they were read.

    Attributes:
        name: what `--data` named.
        x_train, x_test: uint8 or float images [n, height, width, channels].
        y_train, y_test: int64 labels [n], or [n, ...] at each place, in 0 .. classes - 1.
        classes: number of classes.
        class_names: their names, where the data have any.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: int
    class_names: tuple[str, ...] | None = None


def read_images(data: str, classes: int | None = None, image_size: int | None = None) -> Images:
    """Read and check a data set.

    Args:
        data: one of `SOURCES`. Digits have a fixed stratified split. An .npz holds x_train, y_train, x_test, y_test:
            uint8 (or finite float) images [n, height, width, channels] or [n, height, width], and integer labels [n]
            from 0, or [n, ...] at each place; a function of the user's gives the same. A row of a table is one pixel
            with a channel a column.
        classes: number of classes; default as many as have names, or the largest training label + 1.
        image_size: what images in files of their own are scaled to.

    Raises:
        InputError: one line that names the file, the array and what is wrong with it.
    """
    arrays, names = _read(data, image_size)
    for split in ("train", "test"):
        x_key, y_key = f"x_{split}", f"y_{split}"
        arrays[x_key] = checked_images(f"{data}: {x_key}", arrays[x_key])
        arrays[y_key] = checked_labels(f"{data}: {y_key}", arrays[y_key])
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
    named_classes = None if names is None else len(names)
    count = class_count(data, arrays["y_train"], arrays["y_test"], classes or named_classes)
    return Images(name=data, **arrays, classes=count, class_names=None if names is None else tuple(names))


def _read(data: str, image_size: int | None) -> tuple[dict[str, np.ndarray], list[str] | None]:
    """Arrays and names of classes."""
    if data == DIGITS:
        return _digits(), None
    if named.is_named(data):
        return _from_function(data), None
    if data and "\0" not in data and Path(data).is_dir():
        return (read_dataset if is_dataset(Path(data)) else read_folder)(Path(data), image_size)
    if data.lower().endswith(CSV):
        return read_csv(data)
    return read_npz(data, KEYS), None


def content_files(data: str) -> list[Path]:
    """The files that `data` is read from, in order: none for what has a name alone.

    Raises:
        InputError: there is no such file, or a folder is none of data.
    """
    if data == DIGITS or named.is_named(data):
        return []
    if data and "\0" not in data and Path(data).is_dir():
        return dataset_files(Path(data)) if is_dataset(Path(data)) else folder_files(Path(data))
    if not data or "\0" in data or not Path(data).is_file():
        raise InputError(f"{data!r}: no such file" if not data or "\0" in data else f"{data}: no such file")
    return [Path(data)]


def _from_function(data: str) -> dict[str, np.ndarray]:
    given: Any = named.call("data", data)
    if isinstance(given, (tuple, list)) and len(given) == len(KEYS):
        given = dict(zip(KEYS, given))
    if not isinstance(given, dict) or not set(KEYS) <= given.keys():
        raise InputError(f"data {data}: gives {type(given).__name__}, expected a dict of {', '.join(KEYS)}")
    return {key: np.asarray(given[key]) for key in KEYS}


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
