"""The file of a study: what it says, and the cells of the grid that it makes.

    title: Accuracy against size                  # of the report
    description: ...                              # a paragraph below it
    base: {data: digits, model: mlp, epochs: 60}  # settings of every run: any field of `flatprune.Settings`
    grid:                                         # crossed with each other
      target_params: [0.2, 0.1]                   #   a setting and its values
      network:                                    #   or a name and named bundles of settings
        small: {widths: [64, 32]}
        large: {widths: [512, 256]}
      seed: [11, 12, 13]                          #   results are means over the seeds
    variants:                                     # named settings, crossed with the grid; they override it
      method: {}
      no flatness: {flatness: off}                # on and off are words here
      SAM: {flatness: sam, only: {target_params: [0.1]}}         # only at these points of the grid
      one shot: {flatness: off, criterion: l1, prune_then_finetune: 0.5}
      from scratch: {flatness: off, scratch_of: method}
      tuned SAM: {flatness: sam, tune: {sam_radius: [0.05, 0.1, 0.2]}}
    tune: {validation: 0.2, seed: [1, 2]}         # how `tune` chooses
    executors:                                    # options of those that `flatprune study --executor` names
      submitit: {partition: gpu, time: 120, gpus: 1}
    reference: no flatness                        # the variant that the report sets the others against, seed by seed

Special keys of a variant:

- `only`: axis -> values; the variant is run at these points alone.
- `prune_then_finetune: FRACTION`: the classic pipeline in as many epochs: dense training up to this fraction, one
  removal down to the target, fine-tuning (`prune_start` = `prune_end` = FRACTION, `schedule: restart`, if the variant
  does not say another).
- `scratch_of: VARIANT`: the final network of that variant at the same point and seed is trained from fresh weights.
- `tune`: settings and values to choose from, crossed. At every point of the grid each candidate is run with the seeds
  of the study's `tune` and tested on held-out training images (`validation`); the best mean accuracy wins, of equal
  ones the first, and the variant is run with it. All tuned variants of a study must have equally many candidates.

Relative paths of data are taken from the current folder, like those of `flatprune run`, or from `--data-dir`. A
study has 10,000 runs at most, those of tuning included.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flatprune.data import DIGITS
from flatprune.errors import InputError, did_you_mean
from flatprune.execution import executor_options
from flatprune.faults import shown
from flatprune.files.yaml_file import read_yaml
from flatprune.named import is_named
from flatprune.settings import DENSE, Settings
from flatprune.values import field_value, field_values, label

_KEYS = ("title", "description", "base", "grid", "variants", "tune", "reference", "executors")
_SPECIAL = ("only", "prune_then_finetune", "scratch_of", "tune")
MAX_RUNS = 10_000
_TUNE_DEFAULTS = {"validation": 0.2, "seed": [1, 2]}
Point = tuple[tuple[str, str], ...]  # (axis, label of the value) of every axis but the seed


@dataclass(frozen=True)
class Candidate:
    """One choice of a tuned variant.

    Attributes:
        label: as in "sam_radius 0.1".
        values: the settings chosen.
        runs: what it is judged by, one for each seed of the tuning.
    """

    label: str
    values: tuple[tuple[str, Any], ...]
    runs: tuple[Settings, ...]


@dataclass(frozen=True)
class Cell:
    """One run of the grid: a variant at a point with a seed.

    Attributes:
        variant, point, seed: where it stands.
        settings: what is run there, before anything is chosen or taken from another run.
        scratch_of: the variant whose final network it trains from fresh weights.
        candidates: what tuning chooses from.
    """

    variant: str
    point: Point
    seed: int
    settings: Settings
    scratch_of: str | None = None
    candidates: tuple[Candidate, ...] = ()

    @property
    def name(self) -> str:
        """As in "SAM, target_params 0.1, seed 11"."""
        return ", ".join([self.variant, *(f"{axis} {value}" for axis, value in self.point), f"seed {self.seed}"])


@dataclass(frozen=True)
class Study:
    """A study as it was read.

    Attributes:
        path: of its file.
        title, description: for the report.
        axes: the grid without the seed, axis -> labels of its values, in order.
        variants: names, in order.
        cells: all runs, sources before those that depend on them.
        data_dir: folder that relative paths of data are taken from, or None for the current one.
        reference: the variant that the others are set against, or None.
        text: of the file, as it was when it was read.
        executors: name -> options.
    """

    path: Path
    title: str
    description: str
    axes: dict[str, tuple[str, ...]]
    variants: tuple[str, ...]
    cells: tuple[Cell, ...]
    data_dir: Path | None = None
    reference: str | None = None
    text: bytes = b""
    executors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)

    def runs(self) -> Iterator[tuple[str, Settings]]:
        """(name, settings) of everything that may be run, candidates of tuning included."""
        for cell in self.cells:
            for candidate in cell.candidates:
                yield from ((f"{cell.name}, tuning {candidate.label}", settings) for settings in candidate.runs)
            yield cell.name, cell.settings


def read_study(path: Path, data_dir: Path | None = None) -> Study:
    """Read a study.

    Args:
        path: the YAML file.
        data_dir: folder that relative paths of data are taken from; default the current one.

    Raises:
        InputError: naming the file and the entry that cannot be used.
    """
    content, text = read_yaml(path)
    check_keys(f"{path}", content, _KEYS)
    axes = {
        name: values_of(f"{path}: grid", name, values) for name, values in mapping_of(path, content, "grid").items()
    }
    given = axes.pop("seed", [("0", {"seed": 0})])
    if not all("seed" in values for _, values in given):
        raise InputError(f"{path}: grid: seed has an entry without a seed, expected a list of whole numbers")
    seeds = [values["seed"] for _, values in given]
    variants = mapping_of(path, content, "variants") or {"default": {}}
    reader = _Reader(
        path, field_values(f"{path}: base", mapping_of(path, content, "base")), axes, seeds, variants, data_dir
    )
    reader.tuning = {**_TUNE_DEFAULTS, **mapping_of(path, content, "tune")}
    return Study(
        path,
        text_of(path, content, "title", path.stem),
        text_of(path, content, "description", "").strip(),
        {name: tuple(name_of for name_of, _ in values) for name, values in axes.items()},
        tuple(map(str, variants)),
        tuple(reader.cells()),
        data_dir,
        _reference(path, content.get("reference"), variants),
        text,
        read_executors(path, content),
    )


def read_executors(path: Path, content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The section `executors` of a file, checked: name -> options."""
    found = mapping_of(path, content, "executors")
    for name in found:
        given = mapping_of(path, found, name)
        executor_options(f"{path}: executors", name, given)
        found[name] = given
    return found


def text_of(path: Path, content: Mapping[str, Any], key: str, default: str) -> str:
    """An entry that is a text; InputError where it is none."""
    value = content.get(key, default)
    if isinstance(value, (list, dict, bytes, set)):
        raise InputError(f"{path}: {key} is {shown(value)}, expected a text")
    return "" if value is None else str(value)


def _reference(path: Path, name: Any, variants: dict[str, Any]) -> str | None:
    if name is not None and str(name) not in variants:
        raise InputError(f"{path}: reference is {shown(name)}, expected one of {', '.join(variants)}")
    return None if name is None else str(name)


def mapping_of(path: Path, content: Mapping[str, Any], key: str) -> dict[str, Any]:
    """An entry that is a mapping, empty where there is none; InputError where it is another thing."""
    value = content.get(key) or {}
    if not isinstance(value, dict):
        raise InputError(f"{path}: {key} is {shown(value)}, expected a mapping")
    return {str(name): entry for name, entry in value.items()}


def check_keys(where: str, given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Raise InputError for a key that is not known."""
    for key in given:
        if key not in known:
            raise InputError(f"{where}: unknown key {shown(key)}; {did_you_mean(str(key), known)}")


def values_of(where: str, name: str, values: Any) -> list[tuple[str, dict[str, Any]]]:
    """(label, settings) of each value of an axis."""
    if isinstance(values, dict) and values:
        bundles = {str(key): value or {} for key, value in values.items()}
        for key, bundle in bundles.items():
            if not isinstance(bundle, dict):
                raise InputError(f"{where}: {name}: {key} is {shown(bundle)}, expected settings")
        return [(key, field_values(f"{where}: {name}: {key}", bundle)) for key, bundle in bundles.items()]
    if not isinstance(values, list) or not values:
        raise InputError(f"{where}: {name} is {shown(values)}, expected a list of values or named settings")
    entries = [field_value(where, name, value) for value in values]
    if repeated := [entry for entry, count in Counter(entries).items() if count > 1]:
        raise InputError(f"{where}: {name} has {label(repeated[0])} twice")
    return [(label(entry), {name: entry}) for entry in entries]


@dataclass
class _Reader:
    """Makes cells of the parts of a file."""

    path: Path
    base: dict[str, Any]
    axes: dict[str, list[tuple[str, dict[str, Any]]]]
    seeds: list[int]
    variants: dict[str, Any]
    data_dir: Path | None

    def __post_init__(self) -> None:
        self.tuning: dict[str, Any] = dict(_TUNE_DEFAULTS)

    def cells(self) -> Iterator[Cell]:
        """All cells; variants that take another's final network come after it."""
        specials = {name: self._special(name, values) for name, values in self.variants.items()}
        self._check_effort(specials)
        self._check_number(specials)
        for name in sorted(specials, key=lambda name: self._depth(name, specials)):
            for point in itertools.product(*self.axes.values()):
                places = dict(zip(self.axes, (value for value, _ in point)))
                if self._is_wanted(name, places, specials[name].get("only", {})):
                    yield from self._cells_at(
                        name, places, dict(_merged(values for _, values in point)), specials[name]
                    )

    def _special(self, name: str, values: Any) -> dict[str, Any]:
        """A variant's special keys, checked."""
        if not isinstance(values or {}, dict):
            raise InputError(f"{self.path}: variant {name!r} is {shown(values)}, expected settings")
        special = {key: value for key, value in (values or {}).items() if key in _SPECIAL}
        source = special.get("scratch_of")
        if source is not None and (not isinstance(source, str) or source not in self.variants):
            raise InputError(
                f"{self.path}: variant {name!r}: scratch_of is {shown(source)}, expected one of "
                f"{', '.join(self.variants)}"
            )
        for key in ("tune", "only"):
            if not isinstance(special.get(key, {}), dict):
                raise InputError(f"{self.path}: variant {name!r}: {key} is {shown(special[key])}, expected a mapping")
        fraction = special.get("prune_then_finetune", 0.5)
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0.0 < fraction < 1.0:
            raise InputError(
                f"{self.path}: variant {name!r}: prune_then_finetune is {shown(fraction)}, expected one between 0 and 1"
            )
        return special

    def _check_effort(self, specials: dict[str, dict[str, Any]]) -> None:
        counts = {name: len(self._choices(name, special)) for name, special in specials.items() if "tune" in special}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise InputError(f"{self.path}: variants are tuned with unequal effort: {listed}; expected equal numbers")

    def _check_number(self, specials: dict[str, dict[str, Any]]) -> None:
        """Raise InputError where there would be too many runs, before any of them is thought of."""
        total = 0
        for name, special in specials.items():
            only = special.get("only", {})
            points = math.prod(
                len(only[axis]) if isinstance(only.get(axis), list) else 1 if axis in only else len(values)
                for axis, values in self.axes.items()
            )
            tuning = len(self._choices(name, special)) * sum(1 for _ in self._tuning_seeds())
            total += points * (len(self.seeds) + tuning)
        if total > MAX_RUNS or math.prod(map(len, self.axes.values())) > MAX_RUNS:
            raise InputError(f"{self.path}: is a study of more than {MAX_RUNS:,} runs or points")

    def _depth(self, name: str, specials: dict[str, dict[str, Any]]) -> int:
        seen: list[str] = []
        source: str | None = name
        while source is not None:
            if source in seen:
                raise InputError(f"{self.path}: scratch_of goes in a circle: {' -> '.join([*seen, source])}")
            seen.append(source)
            source = specials[source].get("scratch_of")
        return len(seen)

    def _is_wanted(self, name: str, places: dict[str, str], only: dict[str, Any]) -> bool:
        for axis, values in only.items():
            if axis not in self.axes:
                raise InputError(
                    f"{self.path}: variant {name!r}: only: {axis!r} is no axis, expected one of {', '.join(self.axes)}"
                )
            wanted = {label(value) for value in (values if isinstance(values, list) else [values])}
            known = {value for value, _ in self.axes[axis]}
            if not wanted <= known:
                raise InputError(
                    f"{self.path}: variant {name!r}: only: {axis} has no value {', '.join(sorted(wanted - known))}"
                )
            if places[axis] not in wanted:
                return False
        return True

    def _cells_at(
        self, name: str, places: dict[str, str], point: dict[str, Any], special: dict[str, Any]
    ) -> Iterator[Cell]:
        where = f"{self.path}: variant {name!r}"
        own = {key: value for key, value in (self.variants[name] or {}).items() if key not in _SPECIAL}
        values = {**self.base, **point, **_classic(special), **field_values(where, own)}
        if "scratch_of" in special:
            values |= DENSE
        spot = "".join(f", {axis} {value}" for axis, value in places.items())
        candidates = tuple(
            Candidate(
                ", ".join(f"{key} {label(value)}" for key, value in choice.items()),
                tuple(choice.items()),
                tuple(self._settings(where + spot, {**values, **choice, **tuning}) for tuning in self._tuning_seeds()),
            )
            for choice in self._choices(name, special)
        )
        for seed in self.seeds:
            settings = self._settings(f"{where}{spot}, seed {seed}", {**values, "seed": seed})
            yield Cell(name, tuple(places.items()), seed, settings, special.get("scratch_of"), candidates)

    def _choices(self, name: str, special: dict[str, Any]) -> list[dict[str, Any]]:
        if "tune" not in special:
            return []
        where = f"{self.path}: variant {name!r}: tune"
        axes = [values_of(where, str(key), values) for key, values in special["tune"].items()]
        if math.prod(map(len, axes)) > MAX_RUNS:
            raise InputError(f"{where}: has more than {MAX_RUNS:,} candidates")
        return [dict(_merged(values for _, values in choice)) for choice in itertools.product(*axes)]

    def _tuning_seeds(self) -> Iterator[dict[str, Any]]:
        where = f"{self.path}: tune"
        seeds = self.tuning["seed"]
        if seeds == []:
            raise InputError(f"{where}: seed is [], expected a list of whole numbers")
        for seed in seeds if isinstance(seeds, list) else [seeds]:
            yield field_values(where, {**self.tuning, "seed": seed})

    def _settings(self, where: str, values: dict[str, Any]) -> Settings:
        data = values.get("data", DIGITS)
        if data != DIGITS and not is_named(data) and self.data_dir is not None:
            values = {**values, "data": str(self.data_dir / data)}
        try:
            return Settings(**values)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error


def _classic(special: dict[str, Any]) -> dict[str, Any]:
    fraction = special.get("prune_then_finetune")
    return (
        {}
        if fraction is None
        else {"prune_start": float(fraction), "prune_end": float(fraction), "schedule": "restart"}
    )


def _merged(parts: Any) -> Iterator[tuple[str, Any]]:
    for part in parts:
        yield from part.items()
