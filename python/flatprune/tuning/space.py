"""The file of a search: what every trial has, and what is searched.

    title: Learning rate and flatness      # of the table
    base: {data: digits, model: mlp, epochs: 20, target_params: 0.2}   # settings of every trial
    space:                                 # any field of `flatprune.Settings` but those in `FIXED`
      lr: {low: 0.01, high: 1, log: true}  #   a range of numbers, or of whole numbers, as the field is;
      batch_size: {low: 32, high: 256, step: 32}       # log: by orders of magnitude; step: from low on
      criterion: [obs, l1]                 #   or a list of values
    validation: 0.2                        # fraction of the training images that trials are judged on
    executors: {submitit: {partition: gpu, gpus: 1}}   # options, as in the file of a study

Test images play no part in a search.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flatprune.errors import InputError
from flatprune.faults import shown
from flatprune.files.yaml_file import read_yaml
from flatprune.settings import COMPARED, TARGETS, Settings
from flatprune.study.grid import check_keys, mapping_of, read_executors, text_of, values_of
from flatprune.values import field_value, field_values

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

FIXED = (*TARGETS, *COMPARED, "data", "classes", "label_noise", "image_size", "validation", "seed", "device", "threads")
"""Settings in which trials that are compared cannot differ: the size, the data, and where they are made."""
_KEYS = ("title", "base", "space", "validation", "executors")
_RANGE = ("low", "high", "log", "step")
_VALIDATION = 0.2


class Range(NamedTuple):
    """Numbers from low to high, both included."""

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

    def distribution(self) -> BaseDistribution:
        """As Optuna draws from it."""
        from optuna.distributions import FloatDistribution, IntDistribution

        if isinstance(self.low, int):
            return IntDistribution(self.low, int(self.high), self.log, 1 if self.step is None else int(self.step))
        return FloatDistribution(self.low, self.high, self.log, self.step)

    def value(self, drawn: Any) -> Any:
        """Of the setting."""
        return drawn


class Choices(dict[str, Any]):
    """Label -> value."""

    def distribution(self) -> BaseDistribution:
        """As Optuna draws from it: labels, since it keeps no lists."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(tuple(self))

    def value(self, drawn: Any) -> Any:
        """Of the setting."""
        return self[drawn]


@dataclass(frozen=True)
class Tuning:
    """A search as it was read.

    Attributes:
        path: of its file.
        title: for people.
        base: settings of every trial.
        space: setting -> what it is drawn from.
        validation: fraction of the training images that trials are judged on.
        executors: name -> options.
    """

    path: Path
    title: str
    base: dict[str, Any]
    space: dict[str, Range | Choices]
    validation: float
    executors: Mapping[str, Mapping[str, Any]]

    def settings(self, drawn: Mapping[str, Any]) -> Settings:
        """Of a run with what Optuna has drawn; InputError where its parts do not go together."""
        return Settings(**{**self.base, **{name: self.space[name].value(label) for name, label in drawn.items()}})

    def judged(self, drawn: Mapping[str, Any]) -> Settings:
        """The same, tested on training images that are held out."""
        return self.settings(drawn).changed(validation=self.validation)


def read_tuning(path: Path) -> Tuning:
    """Read a search.

    Args:
        path: the YAML file.

    Raises:
        InputError: naming the file and the entry that cannot be used.
    """
    content, _ = read_yaml(path)
    check_keys(f"{path}", content, _KEYS)
    base = field_values(f"{path}: base", mapping_of(path, content, "base"))
    if "validation" in base:
        raise InputError(f"{path}: base: validation stands beside base, not in it")
    space = {
        name: _place(f"{path}: space", name, values) for name, values in mapping_of(path, content, "space").items()
    }
    if not space:
        raise InputError(f"{path}: space is empty, expected settings and what they are drawn from")
    validation = field_value(f"{path}", "validation", content.get("validation", _VALIDATION))
    tuning = Tuning(
        path, text_of(path, content, "title", path.stem), base, space, validation, read_executors(path, content)
    )
    try:
        tuning.judged({})
    except InputError as error:
        raise InputError(f"{path}: base: {error}") from error
    return tuning


def _place(where: str, name: str, given: Any) -> Range | Choices:
    if name in FIXED:
        raise InputError(f"{where}: {name} is what trials have in common, and stands in base")
    if not isinstance(given, dict):
        entries = [(label, values[name]) for label, values in values_of(where, name, given)]
        if len(dict(entries)) < len(entries):
            raise InputError(f"{where}: {name} has values that are written alike: {', '.join(map(str, given))}")
        return Choices(entries)
    check_keys(f"{where}: {name}", given, _RANGE)
    for key in ("low", "high"):
        if key not in given:
            raise InputError(f"{where}: {name} has no {key}, expected low and high, or a list of values")
    low, high = (field_value(f"{where}: {name}: {key}", name, given[key]) for key in ("low", "high"))
    if isinstance(low, bool) or not isinstance(low, (int, float)) or not isinstance(high, (int, float)):
        raise InputError(f"{where}: {name} is no number, expected a list of values")
    return _checked(f"{where}: {name}", Range(low, high, given.get("log", False), given.get("step")))


def _checked(where: str, place: Range) -> Range:
    low, high, log, step = place
    if not low < high:
        raise InputError(f"{where}: low is {low} and high {high}, expected low below high")
    if not isinstance(log, bool):
        raise InputError(f"{where}: log is {shown(log)}, expected true or false")
    if log and low <= 0:
        raise InputError(f"{where}: low is {low}, expected above 0 for a range by orders of magnitude (log)")
    if step is None:
        return place
    kinds = (int,) if isinstance(low, int) else (int, float)
    if isinstance(step, bool) or not isinstance(step, kinds) or not 0 < step <= high - low:
        wanted = "a whole number" if kinds == (int,) else "a number"
        raise InputError(f"{where}: step is {shown(step)}, expected {wanted} above 0 and at most {high - low:g}")
    if log:
        raise InputError(f"{where}: log and step: expected one of them")
    return place
