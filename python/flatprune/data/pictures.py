"""Pictures as PIL reads them: in a folder for each class, or in a data set of Hugging Face's on the disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flatprune.data.splits import split
from flatprune.errors import InputError
from flatprune.extras import needed_by

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
PARTS = ("train", "test")
DATASET_FILES = ("dataset_dict.json", "state.json")  # of `Dataset.save_to_disk`
_IMAGE_COLUMNS, _LABEL_COLUMN = ("image", "img"), "label"
_GREY, _COLOUR = ("1", "L"), ("RGB", "RGBA", "P", "LA", "CMYK", "YCbCr")


class _Picture(NamedTuple):
    """A picture that is read when it is wanted.

    Attributes:
        name: for messages.
        opened: gives PIL's image.
        label: its class.
    """

    name: str
    opened: Callable[[], Any]
    label: int


def is_dataset(folder: Path) -> bool:
    """Whether a folder is a data set of Hugging Face's that was saved to the disk."""
    return any((folder / name).is_file() for name in DATASET_FILES)


def read_folder(folder: Path, image_size: int | None) -> tuple[dict[str, np.ndarray], list[str]]:
    """Arrays as of an .npz, and the names of the classes, which are those of the folders, in alphabetical order.

    Args:
        folder: with `train/CLASS/*` and `test/CLASS/*`, or `CLASS/*`, of which a fifth of each class is held out.
        image_size: height and width that all pictures are scaled to; None: they are of one size.

    Raises:
        InputError: naming the picture or the folder.
    """
    names, parts = _parts(folder)
    with needed_by(f"{folder}: a folder of images"):
        from PIL import Image

    found = [
        [_Picture(str(path), partial(Image.open, path), label) for label, path in _in_folder(part, names)]
        for part in parts
    ]
    return _arrays(str(folder), found, image_size), names


def folder_files(folder: Path) -> list[Path]:
    """The pictures that `read_folder` reads, in its order."""
    names, parts = _parts(folder)
    return [path for part in parts for _, path in _in_folder(part, names)]


def dataset_files(folder: Path) -> list[Path]:
    """The files of a data set that was saved to the disk."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def read_dataset(folder: Path, image_size: int | None) -> tuple[dict[str, np.ndarray], list[str] | None]:
    """The same of a data set that `datasets.Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote.

    Its columns are `image` (or `img`) and `label`; a fifth of each class is held out where it has no part `test`.

    Raises:
        InputError: naming the folder and the column.
        MissingPackageError: `datasets` is not installed.
    """
    with needed_by(f"{folder}: a data set of Hugging Face's"):
        from datasets import load_from_disk
    try:
        loaded = load_from_disk(str(folder))
    except Exception as error:
        raise InputError(f"{folder}: cannot be read as a data set ({type(error).__name__}: {error})") from error
    if hasattr(loaded, "column_names") and not isinstance(loaded, dict):
        parts = [loaded]
    elif lacking := [part for part in PARTS if part not in loaded]:
        raise InputError(f"{folder}: has the parts {', '.join(loaded)}, expected {lacking[0]} among them")
    else:
        parts = [loaded[part] for part in PARTS]
    image = next((name for name in _IMAGE_COLUMNS if name in parts[0].column_names), None)
    if image is None or _LABEL_COLUMN not in parts[0].column_names:
        raise InputError(f"{folder}: has the columns {', '.join(parts[0].column_names)}, expected image and label")
    names = getattr(parts[0].features[_LABEL_COLUMN], "names", None)
    found = [list(_in_dataset(f"{folder}", part, image)) for part in parts]
    return _arrays(str(folder), found, image_size), names


def _parts(folder: Path) -> tuple[list[str], list[Path]]:
    """Names of the classes, and the folders that hold one of each: to train and to test on, or one for both."""
    whole = not all((folder / part).is_dir() for part in PARTS)
    lacking = [part for part in PARTS if not (folder / part).is_dir()]
    if len(lacking) == 1:
        raise InputError(f"{folder}: has no folder {lacking[0]} beside the other, expected train and test, or classes")
    names = _classes(folder if whole else folder / "train")
    parts = [folder] if whole else [folder / part for part in PARTS]
    for part in parts[1:]:
        if unknown := [name for name in _classes(part) if name not in names]:
            raise InputError(f"{part}: has a class {unknown[0]!r} that {parts[0]} has not")
    return names, parts


def _classes(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(names) < 2:
        raise InputError(f"{folder}: holds {len(names)} folders of images, expected one for each class")
    return names


def _in_folder(folder: Path, names: Sequence[str]) -> Iterator[tuple[int, Path]]:
    """(class, file) of the pictures."""
    for label, name in enumerate(names):
        inside = sorted((folder / name).iterdir()) if (folder / name).is_dir() else []
        files = [path for path in inside if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]
        if not files and (folder / name).is_dir():
            raise InputError(f"{folder / name}: holds no image ({', '.join(SUFFIXES)})")
        yield from ((label, path) for path in files)


def _in_dataset(name: str, rows: Any, image: str) -> Iterator[_Picture]:
    for place, label in enumerate(rows[_LABEL_COLUMN]):
        if not isinstance(label, int) or isinstance(label, bool):
            raise InputError(f"{name}: row {place} has the label {label!r}, expected a whole number")
        yield _Picture(f"{name}: row {place}", partial(_row, rows, place, image), label)


def _row(rows: Any, place: int, column: str) -> Any:
    return rows[place][column]


def _arrays(name: str, parts: list[list[_Picture]], image_size: int | None) -> dict[str, np.ndarray]:
    """uint8 arrays of one size, grey where all pictures are."""
    heads = [(picture.name, *_looked_at(picture)) for part in parts for picture in part]
    sizes = Counter(size for _, size, _ in heads)
    if image_size is None and len(sizes) > 1:
        usual = sizes.most_common(1)[0][0]
        odd, size = next((of, size) for of, size, _ in heads if size != usual)
        raise InputError(
            f"{odd}: is {size[0]}x{size[1]}, most are {usual[0]}x{usual[1]}; --image-size N scales all to NxN"
        )
    mode = "L" if all(mode in _GREY for _, _, mode in heads) else "RGB"
    read = [(np.stack([_pixels(picture, mode, image_size) for picture in part]), part) for part in parts]
    x_y = [(x, np.array([picture.label for picture in part], np.int64)) for x, part in read]
    if len(x_y) == 1:
        return split(*x_y[0])
    return {f"{key}_{part}": value for part, both in zip(PARTS, x_y) for key, value in zip("xy", both)}


def _looked_at(picture: _Picture) -> tuple[tuple[int, int], str]:
    """Size and mode, from the head of the file."""
    with _readable(picture) as image:
        if image.mode not in (*_GREY, *_COLOUR):
            raise InputError(f"{picture.name}: has pixels of mode {image.mode}, expected 8 bits a channel; convert it")
        return image.size, image.mode


def _pixels(picture: _Picture, mode: str, image_size: int | None) -> np.ndarray:
    with _readable(picture) as image:
        made = image.convert(mode)
        if image_size is not None and made.size != (image_size, image_size):
            made = made.resize((image_size, image_size), resample=2)  # bilinear, over the whole area when shrinking
        pixels = np.asarray(made, np.uint8)
    return pixels[..., None] if mode == "L" else pixels


@contextmanager
def _readable(picture: _Picture) -> Iterator[Any]:
    try:
        with picture.opened() as image:
            yield image
    except InputError:
        raise
    except Exception as error:  # PIL has one for each format
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{picture.name}: cannot be read as an image ({reason}); replace or remove it") from error
