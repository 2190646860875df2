"""What `flatprune.Settings` accepts: choices, ranges, and which settings exclude each other."""

from __future__ import annotations

import difflib
import math
from typing import TYPE_CHECKING

from flatprune import models
from flatprune.criteria import CRITERIA
from flatprune.errors import InputError
from flatprune.flatness.spectrum import MODES as FLATNESS_MODES
from flatprune.pruning.selection import SELECTIONS
from flatprune.pruning.targets import UNITS

if TYPE_CHECKING:
    from flatprune.settings import Settings

FLATNESS = ("on", "off", "sam", "msam", "on+msam")
OPTIMUM_SHIFT = ("off", "after_pruning")
COMPENSATE = ("auto", "on", "off")
OPTIMIZERS = ("sgd", "adam", "adamw")
AMP = ("off", "bf16", "fp16")
SECOND_PEAKS = {"restart": 1.0, "finetune": 0.1}  # of the learning rate, in training after one-shot pruning
SCHEDULES = ("flat_cosine", "cosine", *SECOND_PEAKS)
TARGETS = {f"target_{unit}": unit for unit in UNITS}
NEED_PRUNING = ("max_predicted_loss", "stop_accuracy_drop")
_CHOICES = {
    "flatness": FLATNESS,
    "flatness_mode": FLATNESS_MODES,
    "optimum_shift": OPTIMUM_SHIFT,
    "criterion": tuple(CRITERIA),
    "selection": SELECTIONS,
    "compensate": COMPENSATE,
    "optimizer": OPTIMIZERS,
    "amp": AMP,
    "schedule": SCHEDULES,
}
_AT_LEAST = {
    "epochs": 1,
    "batch_size": 2,
    "accumulate": 1,
    "seed": 0,
    "image_size": 1,
    "threads": 1,
    "sam_every": 1,
    "flatness_every": 1,
    "latency_batch": 1,
    "round_to": 1,
    "min_width": 1,
    "prune_every": 1,
    "factor_update_steps": 1,
    "test_every": 1,
    "track_hessian": 1,
}
_ABOVE_0 = ("lr", "sam_radius", "max_predicted_loss", "stop_accuracy_drop")
_FROM_0 = ("flatness_strength", "flatness_fade_below", "weight_decay", "mixup")
_FROM_0_BELOW_1 = ("disout", "momentum", "label_smoothing")


def check_settings(settings: Settings) -> None:
    """Raise InputError, naming setting, value and what is wanted, for the first that cannot be used."""
    models.check_name(settings.model)
    _check_target(settings)
    _check_ranges(settings)
    for name, choices in _CHOICES.items():
        _check_choice(name, getattr(settings, name), choices)
    _check_criterion(settings)
    _check_training(settings)
    _check_fractions(settings)


def _check_target(settings: Settings) -> None:
    given = {name: getattr(settings, name) for name in TARGETS if getattr(settings, name) is not None}
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)}: expected one of them")
    for name, fraction in given.items():
        if not 0.0 < fraction <= 1.0:
            raise InputError(f"{name} is {fraction}, expected above 0 and at most 1")
        if fraction == 1.0 and any(getattr(settings, other) is not None for other in NEED_PRUNING):
            raise InputError(f"{name} is 1, which does not prune: {' and '.join(NEED_PRUNING)} need a smaller one")


def _check_ranges(settings: Settings) -> None:
    for name, least in _AT_LEAST.items():
        value = getattr(settings, name)
        if value is not None and value < least:
            raise InputError(f"{name} is {value}, expected {least} or more")
    if settings.seed >= 2**63:
        raise InputError(f"seed is {settings.seed}, expected less than 2^63")
    for name in _ABOVE_0:
        value = getattr(settings, name)
        if value is not None and not (value > 0.0 and math.isfinite(value)):
            raise InputError(f"{name} is {value}, expected a number above 0")
    for name in _FROM_0:
        value = getattr(settings, name)
        if value is not None and not (value >= 0.0 and math.isfinite(value)):
            raise InputError(f"{name} is {value}, expected a number of 0 or more")
    for name in _FROM_0_BELOW_1:
        value = getattr(settings, name)
        if not 0.0 <= value < 1.0:
            raise InputError(f"{name} is {value}, expected 0 or more and below 1")
    if settings.ema is not None and not 0.0 < settings.ema < 1.0:
        raise InputError(f"ema is {settings.ema}, expected a decay above 0 and below 1")
    if not 0.0 <= settings.label_noise <= 1.0:
        raise InputError(f"label_noise is {settings.label_noise}, expected 0 to 1")


def _check_criterion(settings: Settings) -> None:
    criterion = CRITERIA[settings.criterion]
    if settings.max_predicted_loss is not None and not criterion.predicts_loss:
        raise InputError(
            f"max_predicted_loss is {settings.max_predicted_loss:g}, but criterion "
            f"{settings.criterion} predicts no loss"
        )
    if settings.selection == "greedy" and criterion.joint is None:
        raise InputError(f"selection is 'greedy', which criterion {settings.criterion} does not know")


def _check_training(settings: Settings) -> None:
    momentum_sam = "msam" in settings.flatness_parts
    if momentum_sam and settings.sam_every != 1:
        raise InputError(f"sam_every is {settings.sam_every}, but msam costs nothing and acts on every step")
    if momentum_sam and settings.momentum == 0.0:
        raise InputError(f"momentum is 0.0, but flatness {settings.flatness} moves along it, expected above 0")
    if settings.compile and (settings.disout > 0.0 or settings.flatness == "sam"):
        other = "flatness sam" if settings.flatness == "sam" else f"disout {settings.disout:g}"
        raise InputError(f"compile and {other}: expected one of them, compiled code would draw other masks")
    size, parts = settings.batch_size, settings.accumulate
    if size % parts or size // parts < 2:
        raise InputError(
            f"accumulate is {parts}, expected a divisor of batch_size {size} that leaves 2 images or more to each part"
        )


def _check_fractions(settings: Settings) -> None:
    size = settings.train_size
    if size is not None and not (0.0 < size < 1.0 or (size >= 1 and float(size).is_integer())):
        raise InputError(f"train_size is {size}, expected a whole number from 1 or a fraction between 0 and 1")
    if not 0.0 <= settings.prune_start <= settings.prune_end <= 1.0:
        raise InputError(
            f"prune_start is {settings.prune_start} and prune_end {settings.prune_end}, expected 0 to 1, the end not "
            "before"
        )
    if settings.validation is not None and not 0.0 < settings.validation < 1.0:
        raise InputError(f"validation is {settings.validation}, expected a fraction between 0 and 1")
    if settings.architecture_of is not None and settings.widths is not None:
        raise InputError("architecture_of and widths: expected one of them")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(value.lower(), choices, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(choices)}"
        raise InputError(f"{name} is {value!r}; {hint}")
