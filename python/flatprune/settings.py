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
from flatprune.flatness.spectrum import MODES as FLATNESS_MODES
from flatprune.pruning.learning_rate import LR_SCHEDULES, rate_factor
from flatprune.pruning.selection import SELECTIONS
from flatprune.pruning.targets import UNITS, Target

FLATNESS = ("on", "off", "sam", "msam", "on+msam")
OPTIMUM_SHIFT = ("off", "after_pruning")
COMPENSATE = ("auto", "on", "off")
OPTIMIZERS = ("sgd", "adam", "adamw")
AMP = ("off", "bf16", "fp16")
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
    "schedule": LR_SCHEDULES,
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
_AT_MOST = {"epochs": 10**7, "threads": 1024}
_LARGEST = 2**31 - 1  # of other whole numbers, but for the seed
_ABOVE_0 = ("lr", "sam_radius", "max_predicted_loss", "stop_accuracy_drop")
_FROM_0 = ("flatness_strength", "flatness_fade_below", "weight_decay", "mixup")
_FROM_0_BELOW_1 = ("disout", "momentum", "label_smoothing")
_DEFAULT_TARGET_PARAMS = 0.1
_WEIGHT_DECAY = {"sgd": 5e-4, "adam": 5e-4, "adamw": 0.01}
_ADAM_RATE = 1e-3


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
        target_macs, target_neurons, target_latency: the same in multiply-accumulates, prunable neurons or measured
            inference latency (see `flatprune.Target`); one of the four at most.
        latency_batch: images in the forward whose latency counts.
        round_to: widths become multiples of this.
        min_width: neurons that stay in each group at least.
        tie_widths: layers of one kind keep one width, see `flatprune.Pruner`.
        max_predicted_loss: by how much the loss may be predicted to rise at one removal event, or None for any.
        stop_accuracy_drop: percentage points by which the accuracy may fall below its best before pruning ends early,
            or None. It is taken before each removal event on a tenth of the training images, which are not trained on.
        epochs, batch_size, seed: as their names say.
        optimizer: "sgd", "adam" or "adamw".
        lr: learning rate before the schedule, or None: 0.1 with batch norm and 0.05 without for sgd, else 0.001.
        momentum: of sgd; the first of the betas of adam and adamw.
        weight_decay: of weights, not of biases and norms; None: 5e-4, for adamw (where it is decoupled) 0.01.
        label_smoothing: fraction of each training label that is spread over all classes.
        mixup: alpha of Beta(alpha, alpha), from which the fraction of the second image in each mixture is drawn (Zhang
            et al. 2018, arXiv 1710.09412); 0 does not mix.
        ema: decay of an exponential moving average of the weights, which is tested and saved; None: no average.
        accumulate: parts that the images of a step are split into, one forward and backward after the other.
        amp: forwards in mixed precision: "off", "bf16", or "fp16" with a scaled loss.
        channels_last: keep images and convolutions in the memory format channels_last.
        sync_batch_norm: of several processes on GPUs, batch norms see the whole batch.
        compile: train through `torch.compile`, anew after each removal.
        schedule: "flat_cosine" (constant until pruning ends, then a cosine to 0), "cosine" throughout, or one of the
            classic pipeline's: a cosine to 0 until pruning ends and another after it, from the full learning rate
            ("restart") or from a tenth of it ("finetune").
        device: "cpu", "cuda" or "cuda:i".
        threads: CPU threads; None: one for a network too small for a second to help, else PyTorch's default.
        train_size: random subset of the training images, a number of them or (below 1) a fraction; None for all.
        label_noise: fraction of the training labels drawn anew.
        flatness: "on" penalises the spectral radius of the curvature, "off" does nothing, "sam" minimises the loss by
            the gradients of `flatprune.SAM`, "msam" by those of `flatprune.MomentumSAM`, the rivals to compare with;
            "on+msam" penalises at the point that momentum-SAM moves to.
        flatness_mode, flatness_strength, flatness_every, flatness_fade_below: of `flatprune.Flatness`, for "on" and
            "on+msam"; None: its defaults.
        sam_radius: of `flatprune.SAM` and `flatprune.MomentumSAM`.
        sam_every: of `flatprune.SAM`.
        optimum_shift: "after_pruning" applies `flatprune.optimum_shift` on the last 256 images after the last removal,
            "off" does not.
        disout: what the probability of `flatprune.attach_disout` rises to over the training, in [0, 1); 0: none.
        criterion: a name of `flatprune.criteria.CRITERIA`.
        selection: "auto", "independent" or "greedy", see `flatprune.Pruner`.
        compensate: whether survivors take over what removed neurons did: "auto", "on" or "off".
        exclude: names of layers (or of modules around them) whose neurons stay.
        augment: random shifts (and mirror images for colour).
        compare_dense: first train the same network the same way without pruning.
        prune_start, prune_end: fractions of the training between which neurons go; equal ones: all at once.
        prune_every: steps between removals; None: 20, or as many as make about 25 removals.
        factor_update_steps: steps between measurements of the curvature, or None for 5 (10 with convolutions).
        test_every: epochs between tests; the last one is always tested.
        validation: fraction of the training images that are held out and tested on instead of the test images.
        architecture_of: folder of a finished run whose final network is trained from fresh weights, instead of `model`.
        corruptions: test the final network on corrupted test images too (see `flatprune.training.corruptions`).
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
    target_macs: float | None = None
    target_neurons: float | None = None
    target_latency: float | None = None
    latency_batch: int = 64
    round_to: int = 1
    min_width: int = 2
    tie_widths: bool = False
    max_predicted_loss: float | None = None
    stop_accuracy_drop: float | None = None
    epochs: int = 60
    batch_size: int = 128
    seed: int = 0
    optimizer: str = "sgd"
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float | None = None
    label_smoothing: float = 0.0
    mixup: float = 0.0
    ema: float | None = None
    accumulate: int = 1
    amp: str = "off"
    channels_last: bool = False
    compile: bool = False
    sync_batch_norm: bool = False
    schedule: str = "flat_cosine"
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
    selection: str = "auto"
    compensate: str = "auto"
    exclude: tuple[str, ...] = ()
    augment: bool = False
    compare_dense: bool = False
    prune_start: float = 0.1
    prune_end: float = 0.4
    prune_every: int | None = None
    factor_update_steps: int | None = None
    test_every: int = 1
    validation: float | None = None
    architecture_of: str | None = None
    corruptions: bool = False
    measure_latency: bool = False
    track_hessian: int | None = None

    def __post_init__(self) -> None:
        if all(getattr(self, name) is None for name in TARGETS):
            object.__setattr__(self, "target_params", _DEFAULT_TARGET_PARAMS)
        _check(self)
        if self.train_size is not None and self.train_size >= 1:
            object.__setattr__(self, "train_size", int(self.train_size))

    @property
    def target(self) -> Target:
        """The size to reach."""
        fractions = {unit: getattr(self, name) for name, unit in TARGETS.items()}
        return Target(**fractions, latency_batch=self.latency_batch)

    def dense(self) -> Settings:
        """The same training without pruning."""
        values = {**self.as_dict(), **dict.fromkeys([*TARGETS, *NEED_PRUNING]), "target_params": 1.0}
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

    def peak_lr(self, batch_norm: bool) -> float:
        """Learning rate before the schedule, for a network with or without batch norms."""
        if self.lr is not None:
            return self.lr
        return _ADAM_RATE if self.optimizer != "sgd" else 0.1 if batch_norm else 0.05

    @property
    def flatness_parts(self) -> list[str]:
        """What `flatness` is made of: "on+msam" is both."""
        return self.flatness.split("+")

    @property
    def decay_in_use(self) -> float:
        """Weight decay as given, or that of the optimizer."""
        return _WEIGHT_DECAY[self.optimizer] if self.weight_decay is None else self.weight_decay

    def learning_rate(self, step: int, total_steps: int, peak: float) -> float:
        """Learning rate of step 0 .. total_steps - 1, see `flatprune.pruning.learning_rate.rate_factor`."""
        return peak * rate_factor(self.schedule, step, total_steps, self.prune_end)


def _check(settings: Settings) -> None:
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
        most = _AT_MOST.get(name, _LARGEST)
        if value is not None and value > most and name != "seed":
            raise InputError(f"{name} is {value}, expected {most} or less")
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
