"""The pruned network as a program of `torch.export` (.pt2), which torch alone loads and runs."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from flatprune.export.subject import DESCRIPTION_KEY, Subject
from flatprune.files.atomic import damaged, read_bytes
from flatprune.files.sealed import seal, seal_problem

DESCRIPTION_FILE = f"{DESCRIPTION_KEY}.json"  # among the program's extra files


def write(subject: Subject, path: Path) -> list[Path]:
    """Write the program to `path`; the number of images is free."""
    batch = ({0: torch.export.Dim("n")},)
    program = torch.export.export(subject.network, (subject.images(2),), dynamic_shapes=batch)
    buffer = io.BytesIO()  # torch's own writer hides the reason when the disk is full
    torch.export.save(program, buffer, extra_files={DESCRIPTION_FILE: json.dumps(subject.description())})
    path.write_bytes(seal(buffer))
    return [path]


def check(path: Path) -> None:
    """Raise DamagedError where a file is not what `write` wrote; it is not run."""
    if problem := seal_problem(read_bytes(path)):
        raise damaged(path, problem)


def reopen(path: Path) -> Callable[[Tensor], Tensor]:
    """What the file computes."""
    return torch.export.load(path).module()
