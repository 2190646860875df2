"""Rows of numbers in a CSV file, as images of one pixel with a channel for each column."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence

import numpy as np

from flatprune.data.splits import split
from flatprune.errors import InputError

LABEL = "label"
_DELIMITERS = ",;\t"


def read_csv(path: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """Arrays as of an .npz, x [n, 1, 1, columns], and the names of the classes.

    Args:
        path: a file with a header; the class of a row stands in the column `label`, or else in the last. Classes are
            whole numbers or words; the other columns hold numbers. A fifth of each class is held out.

    Raises:
        InputError: naming the file, the line and the column.
    """
    head, rows = _cells(path)
    place = head.index(LABEL) if LABEL in head else len(head) - 1
    columns = [i for i in range(len(head)) if i != place]
    x = np.array([[_number(path, line, head[i], row[i]) for i in columns] for line, row in rows], np.float32)
    names, y = _classes(path, head[place], [row[place].strip() for _, row in rows])
    arrays = split(x[:, None, None, :], y)
    constant = np.flatnonzero(np.ptp(arrays["x_train"][:, 0, 0, :], axis=0) == 0)
    if len(constant):
        column = head[columns[constant[0]]]
        raise InputError(f"{path}: column {column!r} has the same value in every training row; leave it out")
    return arrays, names


def _cells(path: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header and (line, row) of all rows that are not empty, each as wide as the header."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(_DELIMITERS, key=first.count), strict=True)
            rows = list(_numbered(reader))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as CSV ({error})") from error
    if len(rows) < 2:
        raise InputError(f"{path}: has no rows, expected a header and a row a sample")
    head = [name.strip() for name in rows.pop(0)[1]]
    if len(head) < 2 or any(_is_number(name) for name in head):
        raise InputError(f"{path}: line 1 is no header, expected names of columns as in x1,x2,label")
    for line, row in rows:
        if len(row) != len(head):
            raise InputError(f"{path}: line {line} has {len(row)} cells, expected {len(head)} as in the header")
    return head, rows


def _numbered(reader: Iterator[list[str]]) -> Iterator[tuple[int, list[str]]]:
    for row in reader:
        if row:
            yield reader.line_num, row  # type: ignore[attr-defined]


def _number(path: str, line: int, column: str, cell: str) -> float:
    if not _is_number(cell):
        raise InputError(f"{path}: line {line}: {column} is {cell.strip()[:40]!r}, expected a number")
    return float(cell)


def _is_number(cell: str) -> bool:
    try:
        return bool(abs(float(cell)) <= np.finfo(np.float32).max)  # no NaN, no infinity
    except ValueError:
        return False


def _classes(path: str, column: str, cells: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Names of the classes in order, those that are numbers by size, and the class of each row."""
    found = set(cells)
    numeric = all(map(_is_number, found))
    if "" in found or (numeric and not all(float(cell).is_integer() for cell in found)):
        bad = next(cell for cell in cells if cell == "" or (numeric and not float(cell).is_integer()))
        raise InputError(
            f"{path}: {column} is {bad!r} in row {cells.index(bad) + 1}, expected a whole number or a word"
        )
    if 2 * len(found) > len(cells):
        raise InputError(f"{path}: {column} has {len(found)} different values in {len(cells)} rows, expected classes")
    names = sorted(found, key=(lambda cell: float(cell)) if numeric else str)  # type: ignore[arg-type, return-value]
    index = {name: place for place, name in enumerate(names)}
    return names, np.array([index[cell] for cell in cells], np.int64)
