"""All settings of a run in one place: declared once each, with their defaults, bounds and help, and what they imply."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    InstanceOf,
    ValidationError,
    create_model,
    model_validator,
)

from flatprune import models
from flatprune.criteria import CRITERIA
from flatprune.data import DIGITS, MAX_CLASSES, Dataset, load_dataset
from flatprune.errors import InputError
from flatprune.faults import first_fault
from flatprune.flatness.spectrum import MODES, STRENGTH
from flatprune.pruning.learning_rate import LR_SCHEDULES, growth_factor, rate_factor
from flatprune.pruning.selection import SELECTIONS
from flatprune.pruning.targets import UNITS, Target

TARGETS = {f"target_{unit}": unit for unit in UNITS}
NEED_PRUNING = ("max_predicted_loss", "stop_accuracy_drop")
COMPARED = ("compare_dense", "compare_no_flatness")
DENSE = {**dict.fromkeys(TARGETS), "target_params": 1.0}
"""Targets of a run that keeps its network as it is, whatever the target was given in."""
_DEFAULT_TARGET_PARAMS = 0.1
_WEIGHT_DECAY = {"sgd": 5e-4, "adam": 5e-4, "adamw": 0.01}
_LR_GROWTH = {"sgd": 0.0, "adam": 0.5, "adamw": 0.5}
_ADAM_RATE = 1e-3

WHAT, SIZE, TRAINING, PRUNING = "What", "Size to reach", "Training", "Pruning"
FLATNESS, MEASURES, FILES = "Curvature and flatness", "Measurements", "Files and processes"


def _checked_model(name: str) -> str:
    models.check_name(name)
    return name


def _checked_size(size: float | None) -> float | None:
    if size is None or 0.0 < size < 1.0:
        return size
    if size < 1.0 or not size.is_integer():
        raise InputError(f"train_size is {size}, expected a whole number from 1 or a fraction between 0 and 1")
    return int(size)


_LARGEST = 2**31 - 1
Count = Annotated[int, Field(ge=1, le=_LARGEST)]
Text = InstanceOf[str]  # pydantic's own str refuses names of files that are not Unicode
if TYPE_CHECKING:
    Criterion = str
    Mode = str
    Schedule = str
    Selection = str
else:
    Criterion, Mode, Schedule, Selection = (
        Literal[tuple(known)] for known in (CRITERIA, MODES, LR_SCHEDULES, SELECTIONS)
    )


def _setting(panel: str, default: Any, help: str, *, unset: str = "", **bounds: Any) -> Any:
    """Declare a field.

    Args:
        panel: of the command line's help.
        default: what it is if nothing is given.
        help: what it does, for the command line and the documentation.
        unset: what None means.
        bounds: ge, gt, le, lt; strict=False takes lists for tuples.
    """
    return Field(default, description=help, json_schema_extra={"panel": panel, "unset": unset}, **bounds)


_what, _size, _training, _pruning, _flatness, _measured, _files = (
    partial(_setting, panel) for panel in (WHAT, SIZE, TRAINING, PRUNING, FLATNESS, MEASURES, FILES)
)


class Settings(BaseModel):
    """What defines a run; together with the data it determines the result.

    Each is an option of `flatprune run`, whose help describes them, and a key of its `--config`. They cannot be
    changed; `changed` gives others. Equal ones are one key of a dict.

    Raises:
        InputError: naming the first setting that cannot be used; also one that does not exist.

    Example:
        >>> settings = Settings(data="digits", target_macs=0.3, epochs=30)
        >>> settings.changed(seed=1).seed
        1
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    data: Text = _what(
        DIGITS, "digits, FILE.npz, FILE.csv, a folder of images or module:function, see `flatprune list data`"
    )
    model: Annotated[Text, AfterValidator(_checked_model)] = _what(
        "mlp", "network, see `flatprune list models`, or module:function that makes one of your own"
    )
    widths: tuple[Count, ...] | None = _what(
        None, "hidden widths of the network, as in 300,100", unset="its usual", strict=False
    )
    image_size: Count | None = _what(
        None, "average the images down to this height and width; image files are scaled", unset="as they are"
    )
    classes: int | None = _what(None, "number of classes", unset="largest training label + 1", ge=2, le=MAX_CLASSES)
    train_size: Annotated[float | None, AfterValidator(_checked_size)] = _what(
        None, "train on a random subset: a number of images, or a fraction below 1", unset="all"
    )
    validation: float | None = _what(
        None, "test on this fraction of the training images instead of on the test images", gt=0, lt=1
    )
    label_noise: float = _what(
        0.0, "fraction of the training labels drawn anew, uniformly over the classes", ge=0, le=1
    )
    architecture_of: Text | None = _what(
        None, "instead of a model: the final network of the run in this folder, from fresh weights"
    )
    seed: int = _what(0, "of initialisation, order, subset, noise", ge=0, lt=2**63)

    target_params: float | None = _size(
        None, "fraction of the parameters left at the end; 1 does not prune", unset="0.1", gt=0, le=1
    )
    target_macs: float | None = _size(None, "instead: fraction of the multiply-accumulates left", gt=0, le=1)
    target_neurons: float | None = _size(None, "instead: fraction of the prunable neurons left", gt=0, le=1)
    target_latency: float | None = _size(None, "instead: fraction of the measured inference latency left", gt=0, le=1)
    latency_batch: Count = _size(64, "images in the forward that target_latency times")
    round_to: Count = _size(1, "widths become multiples of this")
    min_width: Count = _size(2, "neurons that every layer keeps at least")
    tie_widths: bool = _size(False, "layers of one kind (the MLPs of all blocks, say) keep one width")
    max_predicted_loss: float | None = _size(
        None, "how far the loss may be predicted to rise at one removal event", unset="any", gt=0
    )
    stop_accuracy_drop: float | None = _size(
        None,
        "end pruning when the accuracy on a held-out tenth of the training images falls by more points than this",
        unset="never",
        gt=0,
    )
    exclude: tuple[Text, ...] = _size(
        (), "layers (or modules around them) that keep their neurons: names as in 3,5", strict=False
    )

    epochs: int = _training(60, "passes over the training images", ge=1, le=10**7)
    batch_size: int = _training(128, "images a step", ge=2, le=_LARGEST)
    optimizer: Literal["sgd", "adam", "adamw"] = _training("sgd", "sgd, adam or adamw; on a GPU the fused one")
    lr: float | None = _training(
        None,
        "learning rate before the schedule",
        unset="0.1 with batch norm, 0.05 without; 0.001 for adam, adamw",
        gt=0,
    )
    schedule: Schedule = _training(
        "flat_cosine",
        "of the learning rate: flat_cosine (constant until pruning ends, then a cosine to 0), cosine throughout, or "
        "two cosines, before and after the end of pruning, the second from the full rate (restart) or a tenth of it "
        "(finetune)",
    )
    warmup: float = _training(
        0.0,
        "fraction of the training in which the learning rate rises linearly to that; transformers want 0.05",
        ge=0,
        lt=1,
    )
    lr_growth: float | None = _training(
        None,
        "exponent by which the learning rate rises as the network shrinks: times (parameters at first / now)^NUM",
        unset="0, adam and adamw 0.5",
        ge=0,
        le=1,
    )
    momentum: float = _training(0.9, "of sgd; the first of the betas of adam and adamw", ge=0, lt=1)
    weight_decay: float | None = _training(
        None, "of weights, not of biases and norms", unset="0.0005, adamw 0.01", ge=0
    )
    label_smoothing: float = _training(
        0.0, "fraction of each training label that is spread over all classes", ge=0, lt=1
    )
    mixup: float = _training(
        0.0, "alpha of the Beta distribution by which training images are mixed (arXiv 1710.09412); 0 does not", ge=0
    )
    augment: bool = _training(False, "random shifts, and mirror images for colour")
    ema: float | None = _training(
        None, "test and save an exponential moving average of the weights with this decay", gt=0, lt=1
    )
    accumulate: Count = _training(1, "parts that a step's images go through the network in, for less memory")
    amp: Literal["off", "bf16", "fp16"] = _training(
        "off", "mixed precision of the forwards: off, bf16, or fp16 with a scaled loss"
    )
    channels_last: bool = _training(False, "memory format of images and convolutions")
    compile: bool = _training(False, "train through torch.compile, anew after each removal")
    sync_batch_norm: bool = _training(False, "of several processes on GPUs, batch norms see the whole batch")
    disout: float = _training(0.0, "distort feature maps with a probability that rises to this; 0 does not", ge=0, lt=1)

    criterion: Criterion = _pruning("obs", "which neurons go, see `flatprune list criteria`")
    selection: Selection = _pruning(
        "auto", "whether a score knows which neurons went before: auto, independent or greedy (obs, obd)"
    )
    compensate: Literal["auto", "on", "off"] = _pruning(
        "auto", "survivors take over what removed neurons did: auto, on or off"
    )
    keep_proportions: Literal["auto", "on", "off"] = _pruning(
        "auto",
        "all layers lose the same part of their neurons: auto (in networks with attention), on or off",
    )
    prune_start: float = _pruning(0.1, "fraction of the training before pruning", ge=0, le=1)
    prune_end: float = _pruning(
        0.4, "fraction of the training at which pruning ends; as prune_start: all at once", ge=0, le=1
    )
    prune_every: Count | None = _pruning(
        None, "steps between removals", unset="20, or as many as make about 25 removals"
    )
    optimum_shift: Literal["off", "after_pruning"] = _pruning(
        "off", "off, or after_pruning: after the last removal, the smallest weights with the same outputs on 256 images"
    )

    flatness: Literal["on", "off", "sam", "msam", "on+msam"] = _flatness(
        "on",
        "on penalises the curvature's spectral radius, off does not; sam, msam and on+msam are SAM and momentum-SAM",
    )
    flatness_mode: Mode = _flatness("forward", "how the penalty's gradient is computed: forward or double_backward")
    flatness_strength: float = _flatness(STRENGTH, "weight of the penalty, as a part of the first loss", ge=0)
    flatness_every: Count | None = _flatness(
        None, "the penalty acts on every so many steps", unset="4, with convolutions 8"
    )
    flatness_fade_below: float | None = _flatness(
        None, "the penalty fades below this fraction of the parameters; 0 never", unset="0.05", ge=0
    )
    sam_radius: float = _flatness(0.1, "how far sam and msam move the parameters", gt=0)
    sam_every: Count = _flatness(1, "sam acts on every so many steps")
    factor_update_steps: Count | None = _flatness(
        None, "steps between measurements of the curvature", unset="5, with convolutions 10"
    )

    test_every: Count = _measured(1, "epochs between tests; the last one is always tested")
    compare_dense: bool = _measured(False, "first train the same network the same way without pruning")
    compare_no_flatness: bool = _measured(False, "first train and prune it without the flatness term")
    corruptions: bool = _measured(False, "test the final network on corrupted test images too")
    measure_latency: bool = _measured(False, "time inference before and after")
    track_hessian: int | None = _measured(
        None,
        "measure the true largest Hessian eigenvalue every so many epochs; 0 never",
        unset="at the end",
        ge=0,
        le=_LARGEST,
    )

    device: Text = _files("cpu", "cpu, cuda or cuda:INDEX")
    threads: int | None = _files(None, "CPU threads", unset="1 for small networks, else all cores", ge=1, le=1024)

    def __init__(self, **values: Any) -> None:
        if all(values.get(name) is None for name in TARGETS):
            values["target_params"] = _DEFAULT_TARGET_PARAMS
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InputError(first_fault(error, type(self).model_fields)) from None

    @model_validator(mode="after")
    def _check_relations(self) -> Settings:
        for check in (_check_target, _check_criterion, _check_training, _check_order_and_origin):
            check(self)
        return self

    @classmethod
    def value(cls, name: str, value: Any) -> Any:
        """`value` as the setting `name` holds it, whatever the others are.

        Raises:
            InputError: there is no such setting, or it takes another type or range.
        """
        try:
            return getattr(_alone(name)(**{name: value}), name)
        except ValidationError as error:
            raise InputError(first_fault(error, cls.model_fields)) from None

    @property
    def target(self) -> Target:
        """The size to reach."""
        fractions = {unit: getattr(self, name) for name, unit in TARGETS.items()}
        return Target(**fractions, latency_batch=self.latency_batch)

    def dense(self) -> Settings:
        """The same training without pruning."""
        return self.changed(**{**dict.fromkeys(NEED_PRUNING), **DENSE, **dict.fromkeys(COMPARED, False)})

    def compared(self) -> dict[str, Settings]:
        """What is trained for a comparison first: its name -> its settings."""
        found = {"dense": self.dense()} if self.compare_dense else {}
        if self.compare_no_flatness:
            found["no_flatness"] = self.changed(flatness="off", **dict.fromkeys(COMPARED, False))
        return found

    def changed(self, **values: Any) -> Settings:
        """These settings with others of these values."""
        return Settings(**{**dict(self), **values})

    def as_dict(self) -> dict[str, Any]:
        """Plain values (tuples become lists) for JSON and checkpoints."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """The inverse of `as_dict`, for files: what other versions wrote beside is left out."""
        return cls(**{name: value for name, value in values.items() if name in cls.model_fields})

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

    def dataset(self) -> Dataset:
        """The data set that a run with these settings trains and tests on."""
        return load_dataset(
            self.data,
            seed=self.seed,
            train_size=self.train_size,
            validation=self.validation,
            label_noise=self.label_noise,
            image_size=self.image_size,
            classes=self.classes,
            device=self.torch_device(),
        )

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

    def learning_rate(self, step: int, total_steps: int, peak: float, left: float = 1.0) -> float:
        """Learning rate of step 0 .. total_steps - 1, with this fraction of the parameters left.

        See `rate_factor` and `growth_factor` of `flatprune.pruning.learning_rate`.
        """
        factor = rate_factor(self.schedule, step, total_steps, self.prune_end, self.warmup)
        return peak * factor * growth_factor(left, self.growth_in_use)

    @property
    def growth_in_use(self) -> float:
        """Growth of the learning rate as given, or that of the optimizer."""
        return _LR_GROWTH[self.optimizer] if self.lr_growth is None else self.lr_growth


@cache
def _alone(name: str) -> type[BaseModel]:
    """A model of one field of the settings, or of none for a name that they do not have."""
    fields = {each: (field.annotation, field) for each, field in Settings.model_fields.items() if each == name}
    return create_model("Setting", __config__=Settings.model_config, **fields)  # type: ignore[call-overload]


def _check_target(settings: Settings) -> None:
    given = {name: getattr(settings, name) for name in TARGETS if getattr(settings, name) is not None}
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)}: expected one of them")
    (name, fraction), *_ = given.items()
    if fraction == 1.0 and any(getattr(settings, other) is not None for other in NEED_PRUNING):
        raise InputError(f"{name} is 1, which does not prune: {' and '.join(NEED_PRUNING)} need a smaller one")


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
    if settings.compare_no_flatness and settings.flatness == "off":
        raise InputError("compare_no_flatness and flatness off: expected one of them")
    if settings.compile and (settings.disout > 0.0 or settings.flatness == "sam"):
        other = "flatness sam" if settings.flatness == "sam" else f"disout {settings.disout:g}"
        raise InputError(f"compile and {other}: expected one of them, compiled code would draw other masks")
    size, parts = settings.batch_size, settings.accumulate
    if size % parts or size // parts < 2:
        raise InputError(
            f"accumulate is {parts}, expected a divisor of batch_size {size} that leaves 2 images or more to each part"
        )


def _check_order_and_origin(settings: Settings) -> None:
    if settings.prune_start > settings.prune_end:
        raise InputError(
            f"prune_start is {settings.prune_start} and prune_end {settings.prune_end}, expected the end not before"
        )
    if settings.architecture_of is not None and settings.widths is not None:
        raise InputError("architecture_of and widths: expected one of them")
