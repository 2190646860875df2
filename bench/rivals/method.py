"""What a method is: a file of `bench/rivals/methods` with a subclass of `Method` for each row of the tables."""

from __future__ import annotations

import importlib
import importlib.util
import math
import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor

from bench.rivals import methods
from flatprune.errors import InputError

if TYPE_CHECKING:
    from bench.rivals.training import Training

LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4  # of dense training, and what methods do not set otherwise


class Knob(NamedTuple):
    """The one setting that is tuned.

    Attributes:
        name: as the method has it.
        recommended: by its authors.
        others: the two other values that are tried.
    """

    name: str
    recommended: float | str
    others: tuple[float | str, float | str]

    @property
    def values(self) -> tuple[float | str, ...]:
        """All three, the recommended one first."""
        return (self.recommended, *self.others)


LEARNING_RATE = Knob("lr", LR, (0.05, 0.2))


class Method:
    """A way to a small network, called by `Training` as a user would call it in a loop.

    Attributes:
        title: row of the tables.
        source: where it is from.
        package: what has to be installed, as it is imported; None: nothing but flatprune.
        distribution: the same as pip calls it.
        knob: what is tuned.
        epochs: of training, in those of the task.
        prunes: False where the size of the network does not depend on the target.
        shape_of: name of the method whose final network is trained from fresh weights, None for the whole network.
    """

    title: ClassVar[str]
    source: ClassVar[str]
    package: ClassVar[str | None] = None
    distribution: ClassVar[str | None] = None
    knob: ClassVar[Knob] = LEARNING_RATE
    epochs: ClassVar[int] = 1
    prunes: ClassVar[bool] = True
    shape_of: ClassVar[str | None] = None

    def __init__(self, value: float | str) -> None:
        self.value = value

    @property
    def lr(self) -> float:
        """The learning rate before the schedule."""
        return float(self.value) if self.knob.name == "lr" else LR

    def rate(self, progress: float) -> float:
        """What the learning rate is of `lr` when this fraction of the steps is done: constant to 40 %, then cosine."""
        return cosine((progress - 0.4) / 0.6)

    def begin(self, run: Training) -> None:
        """Before the first step; `run` has model, optimizer and goal."""

    def loss(self, run: Training, x: Tensor, outputs: Tensor, loss: Tensor) -> Tensor:
        """What is differentiated."""
        return loss

    def before_step(self, run: Training) -> None:
        """Between `backward` and the optimizer's step."""

    def after_step(self, run: Training) -> None:
        """After the optimizer's step."""

    def finish(self, run: Training) -> None:
        """After the last step; `run.model` is measured."""

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """What its figures depend on, of which only the values of the knob are not in its own file."""
        return {"knob": cls.knob.name, "recommended": cls.knob.recommended, "epochs": cls.epochs}


def cosine(part: float) -> float:
    """From 1 to 0 as `part` goes from 0 to 1."""
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, max(0.0, part))))


def two_cosines(progress: float, cut: float, second_peak: float) -> float:
    """A cosine until the cut, and another one from `second_peak` after it."""
    if progress < cut:
        return cosine(progress / cut)
    return second_peak * cosine((progress - cut) / (1.0 - cut))


def multistep(progress: float, milestones: tuple[float, ...], factor: float) -> float:
    """Multiplied by `factor` at each milestone."""
    return factor ** sum(progress >= milestone for milestone in milestones)


def all_methods() -> dict[str, type[Method]]:
    """Name -> method: those of every file's `METHODS`, files in alphabetical order, ours first."""
    found: dict[str, type[Method]] = {}
    for info in pkgutil.iter_modules(methods.__path__):
        own: Mapping[str, type[Method]] = importlib.import_module(f"{methods.__name__}.{info.name}").METHODS
        found |= own
    return dict(sorted(found.items(), key=lambda item: not item[0].startswith("ours")))


def chosen_methods(names: list[str] | None) -> dict[str, type[Method]]:
    """The methods of these names, and those whose shape they train; all for None.

    Raises:
        InputError: a name is unknown.
    """
    known = all_methods()
    if names is None:
        return dict(known)
    for name in names:
        if name not in known:
            raise InputError(f"no method is called {name!r}, expected some of {', '.join(known)}")
    needed = {known[name].shape_of for name in names}
    return {name: method for name, method in known.items() if name in names or name in needed}


def is_installed(method: type[Method]) -> bool:
    """Whether what it needs can be imported."""
    return method.package is None or importlib.util.find_spec(method.package) is not None
