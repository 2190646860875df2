"""What a run consists of, made as its settings say: network, optimizer, curvature, flatness, pruner, average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flatprune import models
from flatprune.data import Dataset
from flatprune.errors import InputError
from flatprune.export import fresh_network
from flatprune.flatness.spectrum import Flatness
from flatprune.pruning.pruner import Pruner
from flatprune.pruning.schedule import CubicSchedule
from flatprune.pruning.targets import UNITS, amount
from flatprune.settings import Settings
from flatprune.training.averaging import AveragedWeights
from flatprune.training.evaluation import predictions
from kfac_ext.curvature import Curvature

FACTOR_DECAY = 0.95
_EXAMPLES = 2  # images the pruner traces the network with
_SECOND_BETA = 0.999
_MOST_EVENTS = 1_000_000


def untrained(settings: Settings, arguments: dict[str, Any]) -> nn.Module:
    """The network before its first step, on the CPU; `arguments` are those of `flatprune.models.build`."""
    if settings.architecture_of is not None:
        return fresh_network(settings.architecture_of, arguments)
    return models.build(**arguments)


def check_logits(model: nn.Module, dataset: Dataset) -> None:
    """Refuse a network whose logits are not at the places that the labels are at.

    Raises:
        InputError: naming both shapes.
    """
    found, labels = tuple(predictions(model, dataset.x_test[:1]).shape[1:]), tuple(dataset.y_train.shape)
    wanted = (dataset.classes, *labels[1:])
    if found != wanted:
        raise InputError(
            f"{dataset.name}: y_train has shape {labels}, for which the network is to give logits of {wanted} an "
            f"image; it gives {found}"
        )


def make_optimizer(settings: Settings, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The optimizer, with weight decay for weights alone.

    On a GPU the fused one: a `GradScaler` need not read from the device then whether to skip a step.
    """
    groups = parameter_groups(model, settings.decay_in_use)
    fused = fused_optimizer(next(model.parameters()).device)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=settings.momentum, fused=fused)
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=lr, betas=(settings.momentum, _SECOND_BETA), fused=fused)


def fused_optimizer(device: torch.device) -> bool | None:
    """Whether an optimizer on this device is the fused one; None: as torch likes."""
    return True if device.type == "cuda" else None


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimizer groups: weights, with weight decay, and biases and norms, without."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def make_curvature(settings: Settings, model: nn.Module) -> Curvature:
    """The running factors; those of a batch in parts are the same as those of the whole batch."""
    generator = torch.Generator().manual_seed(settings.seed)
    if settings.accumulate == 1:
        return Curvature(model, factor_update_steps=settings.factor_update_steps, generator=generator)

    def every() -> int:  # the layers are known from the first forward on
        return settings.factor_update_steps or (10 if curvature.has_convolutions else 5)

    parts = BatchInParts(settings.accumulate, every, FACTOR_DECAY)
    curvature = Curvature(model, factor_update_steps=parts.update_steps, factor_decay=parts.decay, generator=generator)
    return curvature


class BatchInParts:
    """When the factors are updated, and with which decay, so that the parts of a batch count as the whole batch.

    After the parts M_1 .. M_n of a batch the factors are d F + (1 - d) mean M_i. Part i is blended in with the decay
    1 - w / (1 - (n - i) w), w = (1 - d) / n, which leaves each part the weight w and F the weight d; in the first
    batch of all with (i - 1) / i, which leaves the mean.

    Args:
        parts: n, forwards a batch.
        every: gives the batches between updates.
        decay: d.
    """

    def __init__(self, parts: int, every: Callable[[], int], decay: float) -> None:
        self._parts, self._every, self._decay = parts, every, decay

    def update_steps(self, forward: int) -> int:
        """For `Curvature`: 1 in forwards (from 0) that count, and what does not divide their number in others."""
        return 1 if (forward // self._parts) % self._every() == 0 else forward + 1

    def decay(self, forward: int) -> float:
        """For `Curvature`: the decay at a forward, from 0."""
        place = forward % self._parts
        if forward < self._parts:
            return place / (place + 1)
        weight = (1.0 - self._decay) / self._parts
        return 1.0 - weight / (1.0 - (self._parts - place - 1) * weight)


def make_flatness(settings: Settings, curvature: Curvature, total_steps: int) -> Flatness:
    """The flatness term; every part of a batch is one of its steps."""
    given = {name: getattr(settings, f"flatness_{name}") for name in ("strength", "every", "fade_below")}
    chosen = {name: value for name, value in given.items() if value is not None}
    steps = total_steps * settings.accumulate
    return Flatness(curvature, total_steps=steps, mode=settings.flatness_mode, **chosen)


def make_schedule(settings: Settings, total_steps: int) -> CubicSchedule:
    """When neurons go.

    Raises:
        InputError: at more events than anybody can mean.
    """
    events = (settings.prune_end - settings.prune_start) * total_steps / (settings.prune_every or total_steps)
    if events > _MOST_EVENTS:
        raise InputError(
            f"prune_every is {settings.prune_every}, which makes {events:.0f} removal events in "
            f"{total_steps} steps, expected {_MOST_EVENTS} or fewer"
        )
    return CubicSchedule(total_steps, settings.prune_start, settings.prune_end, settings.prune_every)


def _switch(choice: str) -> str | bool:
    """A setting of auto, on or off as `Pruner` takes it."""
    return choice if choice == "auto" else choice == "on"


def make_pruner(
    settings: Settings,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    curvature: Curvature,
    dataset: Dataset,
    total_steps: int,
    average: AveragedWeights | None,
) -> Pruner:
    """The pruner.

    Raises:
        InputError: a layer that the settings name is not there or cannot be pruned.
    """
    try:
        return Pruner(
            model,
            optimizer,
            curvature,
            dataset.x_train[:_EXAMPLES],
            target=settings.target,
            total_steps=total_steps,
            schedule=make_schedule(settings, total_steps),
            criterion=settings.criterion,
            compensate=_switch(settings.compensate),
            selection=settings.selection,
            seed=settings.seed,
            round_to=settings.round_to,
            min_width=settings.min_width,
            tie_widths=settings.tie_widths,
            keep_proportions=_switch(settings.keep_proportions),
            max_predicted_loss=settings.max_predicted_loss,
            exclude=settings.exclude,
            ema_models=[] if average is None else [average.module],
        )
    except (KeyError, ValueError) as error:
        raise InputError(str(error.args[0])) from error


def check_reachable(pruner: Pruner, model: str) -> None:
    """Refuse a target below what the limits leave of the network.

    Raises:
        InputError: naming target, limits and the least that is left.
    """
    target, start, least = pruner.target, pruner.cost_start, pruner.reachable()
    if least <= target.fraction * start:
        return
    goal, whole, kept = (amount(target.unit, cost) for cost in (target.fraction * start, start, least))
    raise InputError(
        f"target_{target.unit} is {target.fraction:g}, {goal} of {whole} {UNITS[target.unit]}, but {model} keeps "
        f"at least {kept} ({least / start:.2g}) with round_to {pruner.limits.round_to} and "
        f"min_width {pruner.limits.min_width}"
    )


class Compiled:
    """The forward of a model through `torch.compile`, but for those that the curvature looks into.

    Code that was compiled without hooks does not see those that come later.

    Args:
        model: the network.
        curvature: of the plain model.
    """

    def __init__(self, model: nn.Module, curvature: Curvature) -> None:
        self._model, self._curvature = model, curvature
        self._forward: Callable[[Tensor], Tensor] = torch.compile(model)

    def __call__(self, x: Tensor) -> Tensor:
        """The model's output.

        Raises:
            InputError: nothing can be compiled here.
        """
        if self._curvature.observes_next:
            return self._model(x)
        try:
            return self._forward(x)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"compile: torch.compile fails here ({reason}); leave it out") from error

    def renew(self) -> None:
        """Forget what was compiled: a model that lost neurons would soon reach torch's limit of recompilations."""
        torch.compiler.reset()
        self._forward = torch.compile(self._model)
