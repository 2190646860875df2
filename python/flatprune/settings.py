"""All settings of a run in one place: their defaults, their checks, the learning rate they imply."""

from __future__ import annotations

import difflib
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from flatprune import models
from flatprune.criteria import CRITERIA
from flatprune.errors import InputError
from flatprune.selection import SELECTIONS
from flatprune.spectrum import MODES as FLATNESS_MODES
from flatprune.targets import UNITS, Target

FLATNESS = ("on", "off", "sam", "msam")
OPTIMUM_SHIFT = ("off", "after_pruning")
COMPENSATE = ("auto", "on", "off")
SECOND_PEAKS = {"restart": 1.0, "finetune": 0.1}  # of the learning rate, in training after one-shot pruning
SCHEDULES = ("fc", "cosine", *SECOND_PEAKS)
_CHOICES = {
    "flatness": FLATNESS,
    "flatness_mode": FLATNESS_MODES,
    "optimum_shift": OPTIMUM_SHIFT,
    "criterion": tuple(CRITERIA),
    "selection": SELECTIONS,
    "compensate": COMPENSATE,
    "schedule": SCHEDULES,
}
_TARGETS = {f"target_{unit}": unit for unit in UNITS}
_DEFAULT_TARGET_PARAMS = 0.1
_NEED_PRUNING = ("max_predicted_loss", "stop_accuracy_drop")
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4


@dataclass(frozen=True)
class Settings:
    """What defines a run; together with the data it determines the result.

    Attributes:
        data: "digits" or the path of an .npz file.
        model: name of a network, see `flatprune.models`.
        widths: hidden widths of the network, or None for its usual ones.
        image_size: average the images down to image_size x image_size, or None.
        classes: number of classes, or None for the largest training label + 1.
        target_params: fraction of the parameters left at the end, in (0, 1]; 1 trains without pruning. 0.1 unless
            another target is given.
        target_flops, target_neurons, target_latency: the same in multiply-accumulates, prunable neurons or measured
            inference latency (see `flatprune.Target`); one of the four at most.
        latency_batch: images in the forward whose latency counts.
        round_to: widths become multiples of this.
        min_width: neurons that stay in each group at least.
        max_predicted_loss: by how much the loss may be predicted to rise at one removal event, or None for any.
        stop_accuracy_drop: percentage points by which the accuracy may fall below its best before pruning ends early,
            or None. It is taken before each removal event on a tenth of the training images, which are not trained on.
        epochs, batch_size, seed: as their names say.
        lr: learning rate before the schedule, or None for 0.1 with batch norm and 0.05 without.
        schedule: "fc" (constant until pruning ends, then a cosine to 0), "cosine" throughout, or one of the classic
            pipeline's: a cosine to 0 until pruning ends and another after it, from the full learning rate ("restart")
            or from a tenth of it ("finetune").
        device: "cpu", "cuda" or "cuda:i".
        threads: CPU threads; None: one for a network too small for a second to help, else PyTorch's default.
        train_size: random subset of the training images, a number of them or (below 1) a share; None for all.
        label_noise: fraction of the training labels drawn anew.
        flatness: "on" penalises the spectral radius of the curvature, "off" does nothing, "sam" minimises the loss by
            the gradients of `flatprune.SAM`, "msam" by those of `flatprune.MomentumSAM`, the rivals to compare with.
        flatness_mode, flatness_strength, flatness_every, flatness_fade_below: of `flatprune.Flatness`, for "on"; None:
            its defaults.
        sam_radius: of `flatprune.SAM` and `flatprune.MomentumSAM`.
        sam_every: of `flatprune.SAM`.
        optimum_shift: "after_pruning" applies `flatprune.optimum_shift` on the last 256 images after the last removal,
            "off" does not.
        disout: what the probability of `flatprune.disout` rises to over the training, in [0, 1); 0: no distortion.
        criterion: a name of `flatprune.criteria.CRITERIA`.
        selection: "independent" or "greedy", see `flatprune.Pruner`.
        compensate: whether survivors take over what removed neurons did: "auto", "on" or "off".
        exclude: names of layers (or of modules around them) whose neurons stay.
        augment: random shifts (and mirror images for colour).
        compare_dense: first train the same network the same way without pruning.
        prune_start, prune_end: shares of the training between which neurons go; equal ones: all at once.
        prune_every: steps between removals.
        factor_update_steps: steps between measurements of the curvature, or None for 5 (10 with convolutions).
        validation: share of the training images that are held out and tested on instead of the test images.
        architecture_of: folder of a finished run whose final network is trained from fresh weights, instead of `model`.
        corruptions: test the final network on corrupted test images too (see `flatprune.corruptions`).
        measure_latency: time inference before and after.
        track_hessian: measure the largest Hessian eigenvalue, and K-FAC radii of both kinds, every so many epochs.

    Raises:
        InputError: naming the first setting that cannot be used.
    """

    data: str = "digits"
    model: str = "mlp"
    widths: tuple[int, ...] | None = None
    image_size: int | None = None
    classes: int | None = None
    target_params: float | None = None
    target_flops: float | None = None
    target_neurons: float | None = None
    target_latency: float | None = None
    latency_batch: int = 64
    round_to: int = 1
    min_width: int = 2
    max_predicted_loss: float | None = None
    stop_accuracy_drop: float | None = None
    epochs: int = 60
    batch_size: int = 128
    seed: int = 0
    lr: float | None = None
    schedule: str = "fc"
    device: str = "cpu"
    threads: int | None = None
    train_size: float | None = None
    label_noise: float = 0.0
    flatness: str = "on"
    flatness_mode: str = "forward"
    flatness_strength: float | None = None
    flatness_every: int | None = None
    flatness_fade_below: float | None = None
    sam_radius: float = 0.1
    sam_every: int = 1
    optimum_shift: str = "off"
    disout: float = 0.0
    criterion: str = "obs"
    selection: str = "independent"
    compensate: str = "auto"
    exclude: tuple[str, ...] = ()
    augment: bool = False
    compare_dense: bool = False
    prune_start: float = 0.1
    prune_end: float = 0.4
    prune_every: int = 20
    factor_update_steps: int | None = None
    validation: float | None = None
    architecture_of: str | None = None
    corruptions: bool = False
    measure_latency: bool = False
    track_hessian: int | None = None

    def __post_init__(self) -> None:
        models.check_name(self.model)
        self._check_target()
        for name, least in (
            ("epochs", 1),
            ("batch_size", 2),
            ("seed", 0),
            ("image_size", 1),
            ("threads", 1),
            ("sam_every", 1),
            ("flatness_every", 1),
            ("latency_batch", 1),
            ("round_to", 1),
            ("min_width", 1),
            ("prune_every", 1),
            ("factor_update_steps", 1),
            ("track_hessian", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} is {value}, expected {least} or more")
        if self.seed >= 2**63:
            raise InputError(f"seed is {self.seed}, expected less than 2^63")
        for name in ("lr", "sam_radius", "max_predicted_loss", "stop_accuracy_drop"):
            value = getattr(self, name)
            if value is not None and not (value > 0.0 and math.isfinite(value)):
                raise InputError(f"{name} is {value}, expected a number above 0")
        for name in ("flatness_strength", "flatness_fade_below"):
            value = getattr(self, name)
            if value is not None and not (value >= 0.0 and math.isfinite(value)):
                raise InputError(f"{name} is {value}, expected a number of 0 or more")
        if not 0.0 <= self.disout < 1.0:
            raise InputError(f"disout is {self.disout}, expected 0 or more and below 1")
        if self.flatness == "msam" and self.sam_every != 1:
            raise InputError(f"sam_every is {self.sam_every}, but msam costs nothing and acts on every step")
        if not 0.0 <= self.label_noise <= 1.0:
            raise InputError(f"label_noise is {self.label_noise}, expected 0 to 1")
        for name, choices in _CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        criterion = CRITERIA[self.criterion]
        if self.max_predicted_loss is not None and not criterion.predicts_loss:
            raise InputError(
                f"max_predicted_loss is {self.max_predicted_loss:g}, but criterion {self.criterion} predicts no loss"
            )
        if self.selection == "greedy" and criterion.joint is None:
            raise InputError(f"selection is 'greedy', which criterion {self.criterion} does not know")
        self._check_shares()

    def _check_target(self) -> None:
        given = {name: getattr(self, name) for name in _TARGETS if getattr(self, name) is not None}
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)}: expected one of them")
        if not given:
            object.__setattr__(self, "target_params", _DEFAULT_TARGET_PARAMS)
        for name, share in given.items():
            if not 0.0 < share <= 1.0:
                raise InputError(f"{name} is {share}, expected above 0 and at most 1")
            if share == 1.0 and any(getattr(self, other) is not None for other in _NEED_PRUNING):
                raise InputError(f"{name} is 1, which does not prune: {' and '.join(_NEED_PRUNING)} need a smaller one")

    def _check_shares(self) -> None:
        size = self.train_size
        if size is not None and not (0.0 < size < 1.0 or (size >= 1 and float(size).is_integer())):
            raise InputError(f"train_size is {size}, expected a whole number from 1 or a share between 0 and 1")
        if size is not None and size >= 1:
            object.__setattr__(self, "train_size", int(size))
        if not 0.0 <= self.prune_start <= self.prune_end <= 1.0:
            raise InputError(
                f"prune_start is {self.prune_start} and prune_end {self.prune_end}, expected 0 to 1, the end not before"
            )
        if self.validation is not None and not 0.0 < self.validation < 1.0:
            raise InputError(f"validation is {self.validation}, expected a share between 0 and 1")
        if self.architecture_of is not None and self.widths is not None:
            raise InputError("architecture_of and widths: expected one of them")

    @property
    def target(self) -> Target:
        """The size to reach."""
        shares = {unit: getattr(self, name) for name, unit in _TARGETS.items()}
        return Target(**shares, latency_batch=self.latency_batch)

    def dense(self) -> Settings:
        """The same training without pruning."""
        values = {**self.as_dict(), **dict.fromkeys([*_TARGETS, *_NEED_PRUNING]), "target_params": 1.0}
        return Settings.from_dict({**values, "compare_dense": False})

    def as_dict(self) -> dict[str, Any]:
        """Plain values (tuples become lists) for JSON and checkpoints."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """The inverse of `as_dict`."""
        known = {field.name for field in fields(cls)}
        kept: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}
        return cls(**kept)

    def torch_device(self) -> torch.device:
        """The device, once it is known to be there.

        Raises:
            InputError: it is not.
        """
        kind, _, index = self.device.partition(":")
        if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
            raise InputError(f"device is {self.device!r}, expected cpu, cuda or cuda:INDEX")
        if kind == "cuda" and not torch.cuda.is_available():
            reason = "this PyTorch is built without CUDA" if torch.version.cuda is None else "no GPU is reachable"
            raise InputError(f"device {self.device} cannot be used: {reason}")
        if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
            raise InputError(f"device {self.device} cannot be used: there are {torch.cuda.device_count()} GPUs, from 0")
        return torch.device(self.device)

    def learning_rate(self, step: int, total_steps: int, peak: float) -> float:
        """Learning rate of step 0 .. total_steps - 1.

        "fc": peak until pruning ends, then peak (1 + cos(pi t)) / 2, t from 0 to 1. "cosine": t over all steps.
        "restart" (Renda, Frankle & Carbin 2020, arXiv 2003.02389) and "finetune": that cosine until pruning ends, and
        another after it, from peak or from peak / 10.
        """
        start = 0.0 if self.schedule == "cosine" else self.prune_end * total_steps
        if step >= start:
            second = SECOND_PEAKS.get(self.schedule, 1.0)
            return second * peak * _half_cosine((step - start) / (total_steps - start))
        return peak if self.schedule == "fc" else peak * _half_cosine(step / start)


def _half_cosine(part: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * part))


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(value.lower(), choices, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(choices)}"
        raise InputError(f"{name} is {value!r}; {hint}")
