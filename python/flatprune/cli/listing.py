"""`flatprune list`: what there is to choose from."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated

import torch
import typer

from flatprune import models
from flatprune.criteria import CRITERIA
from flatprune.data import SOURCES
from flatprune.errors import InputError, did_you_mean

_SHAPE, _CLASSES = (3, 32, 32), 10


def list_command(
    what: Annotated[
        str, typer.Argument(metavar="models|criteria|data", help="which list", autocompletion=lambda: _TABLES)
    ],
) -> None:
    """Name the models, the criteria or the kinds of data there are."""
    if what not in _TABLES:
        raise InputError(f"list: there are no {what!r}; {did_you_mean(what, _TABLES)}")
    from rich.console import Console

    from flatprune.study.tables import Table

    head, *rows = _TABLES[what]()
    Table("", head, tuple(rows), left=len(head)).show(Console())


def _models() -> list[tuple[str, ...]]:
    rows = []
    for name, make in models.MODELS.items():
        with torch.device("meta"):
            size = models.parameter_count(make(_SHAPE, _CLASSES))
        rows.append((name, _summary(make), f"{size:,}"))
    return [("model", "what it is", f"parameters, {_SHAPE[1]}x{_SHAPE[2]}x{_SHAPE[0]}, {_CLASSES} classes"), *rows]


def _criteria() -> list[tuple[str, ...]]:
    found = [(name, _summary(criterion.score), criterion.source) for name, criterion in CRITERIA.items()]
    return [("criterion", "what it scores", "source"), *found]


def _data() -> list[tuple[str, ...]]:
    return [("--data", "what it is", "needs"), *SOURCES]


_TABLES: dict[str, Callable[[], list[tuple[str, ...]]]] = {"models": _models, "criteria": _criteria, "data": _data}


def _summary(of: object) -> str:
    """The first paragraph of a docstring."""
    text = inspect.getdoc(getattr(of, "func", of)) or ""
    return " ".join(text.partition("\n\n")[0].split())
