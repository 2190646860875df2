"""Everything that can be wrong with the runs of a study, found before the first."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flatprune import named
from flatprune.data import Dataset
from flatprune.errors import InputError
from flatprune.settings import Settings
from flatprune.training.trainer import Trainer

_OF_THE_DATA = ("data", "seed", "train_size", "validation", "label_noise", "image_size", "classes")


def check_runs(
    path: Path,
    runs: Iterable[tuple[str, Settings]],
    note: Callable[[str], None] = lambda text: None,
    *,
    made_here: bool = True,
) -> dict[Settings, int]:
    """Read all data, build every network and the pruner of every run, once for settings that differ in the seed alone.

    Args:
        path: of the file that they stand in.
        runs: (name, settings) of each.
        note: told what the pruner warns of, each once.
        made_here: check that this machine has their devices, too.

    Returns:
        Optimizer steps of every run.

    Raises:
        InputError: naming the file, the entry and what is wrong with it.
    """
    steps: dict[Settings, int] = {}
    data: dict[Any, Dataset] = {}
    noted: set[str] = set()
    for name, settings in runs:
        general = settings.changed(seed=0, device="cpu")
        named.allow(settings.model, settings.data)  # the user has, in the file
        try:
            if made_here:
                settings.torch_device()
            if general not in steps:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    steps[general] = Trainer(general, _dataset(general, data)).total_steps
                noted |= {str(warning.message) for warning in caught}
        except InputError as error:
            raise InputError(f"{path}: {name}: {error}") from error
        steps[settings] = steps[general]
    for text in sorted(noted):
        note(text)
    return steps


def _dataset(settings: Settings, known: dict[Any, Dataset]) -> Dataset:
    key = tuple(getattr(settings, name) for name in _OF_THE_DATA)
    if key not in known:
        known.clear()  # one at a time is held: points that share their data follow each other
        known[key] = settings.dataset()
    return known[key]
