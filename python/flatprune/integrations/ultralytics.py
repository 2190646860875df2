"""Ultralytics: a trainer that prunes a YOLO while it trains; what it saves loads with `YOLO(path)`, as ever."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.engine.trainer import BaseTrainer

from flatprune.errors import InputError
from flatprune.integrations.state_file import STATE_FILE, load_state, save_state
from flatprune.prune_while_training import PruneWhileTraining
from flatprune.pruning.targets import Target
from kfac_ext.curvature.capture import ForwardHook

_STRIDES = 2  # pixels of a network's largest stride that an image for the search of couplings has a side of
_UNSUPPORTED = {  # argument of `YOLO.train` -> why
    "compile": "compiled code hides the layers; train without it",
    "distill_model": "the teacher is part of the model that would be pruned; train without it",
    "time": "an end by the clock leaves the schedule of removals without an end; give epochs",
}


class PruningTrainer(BaseTrainer):
    """What `pruning_trainer` puts before the trainer of a task."""

    data: dict[str, Any]
    _target: Target | float | None = None
    _arguments: Mapping[str, Any] = {}

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._pruning: PruneWhileTraining | None = None
        self._judged = 0  # parameters of the network that the best fitness is of
        self._saved = 0  # and of the one in last.pt
        _refuse(self)
        self.add_callback("on_pretrain_routine_end", PruningTrainer._begin)
        self.add_callback("teardown", PruningTrainer._end)

    @property
    def pruning(self) -> PruneWhileTraining:
        """The `PruneWhileTraining`; raises InputError before training has begun, and where nothing is pruned."""
        if self._pruning is None:
            raise InputError("PruningTrainer: nothing is pruned before training has begun, nor with target=None")
        return self._pruning

    def get_model(self, cfg: Any = None, weights: nn.Module | None = None, verbose: bool = True) -> nn.Module:
        """The network to train: a pruned one as it is, where its configuration would give the full size."""
        full: Any = super().get_model(deepcopy(cfg), weights, verbose)  # it writes the classes to cfg
        if weights is None or not self._is_pruned(weights, full):
            return full
        pruned: Any = deepcopy(weights).float().requires_grad_(True)
        pruned.criterion = None
        return pruned

    def _is_pruned(self, weights: Any, full: Any) -> bool:
        """Whether a network has other widths than its configuration says, that of `full` but for the classes."""
        if not hasattr(weights, "yaml") or {**weights.yaml, "nc": 0} != {**full.yaml, "nc": 0}:
            return False
        classes, wanted = weights.yaml["nc"], full.yaml["nc"]
        reference = full if classes == wanted else self._full_size(weights.yaml)
        own, others = weights.state_dict(), reference.state_dict()
        if all(own[name].shape == others[name].shape for name in own if name in others):
            return False
        if classes != wanted:
            raise InputError(f"PruningTrainer: the pruned network is of {classes} classes, the data of {wanted}")
        if own.keys() != others.keys():
            raise InputError(
                "PruningTrainer: the pruned network is fused for inference; train from its file, YOLO(path)"
            )
        return True

    def _full_size(self, configuration: Mapping[str, Any]) -> Any:
        """A network as it is configured, whatever the data's classes."""
        data, self.data = self.data, {**self.data, "nc": configuration["nc"]}
        try:
            return super().get_model(deepcopy(configuration), None, False)
        finally:
            self.data = data

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The images first, whose number is the batch's; boxes would be counted otherwise."""
        batch = super().preprocess_batch(batch)
        return {"img": batch["img"], **batch}

    def optimizer_step(self) -> None:
        """A step, the average's update, and at an event a removal from both networks."""
        super().optimizer_step()
        if self._pruning is None:
            return
        # made anew when Ultralytics recovers from a loss that is not finite
        self._pruning.pruner.ema_models = (self.ema.ema,)
        if any(removal.removed for removal in self._pruning.step()):
            self.ema._pairs = None  # kept from its first update on, of the tensors that were cut

    def validate(self) -> Any:
        """Compare networks of the wanted size alone: `best.pt` is one of them, and patience begins with them."""
        if self._pruning is not None:
            if not self._pruning.finished or self._pruning.pruner.params != self._judged:
                self.best_fitness, self.stopper.best_fitness, self.stopper.best_epoch = None, 0.0, self.epoch + 1
            self._judged = self._pruning.pruner.params
        return super().validate()

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        """The row of results.csv, with the parameters of the network."""
        size = {} if self._pruning is None else {"size/params": self._pruning.pruner.params}
        super().save_metrics({**metrics, **size})

    def save_model(self) -> Any:
        """`last.pt` and `best.pt`, and beside them what pruning needs to go on."""
        written = super().save_model()
        if self._pruning is not None:
            self._saved = self._pruning.pruner.params
            # no factors: a resumed run begins with the averaged weights, which they are not of
            state = {name: part for name, part in self._pruning.state_dict().items() if name != "curvature"}
            save_state(self.wdir, state, epoch=self.epoch)
        return written

    def _handle_nan_recovery(self, epoch: int) -> bool:
        if self._pruning is not None and epoch > self.start_epoch and not self._is_finite():
            left = self._pruning.pruner.params
            if left != self._saved:
                raise InputError(
                    f"PruningTrainer: the loss or the fitness of epoch {epoch + 1} is not finite, and last.pt is from "
                    f"before a removal ({self._saved:,} parameters, {left:,} now); train with a lower lr0 or amp=False"
                )
        recovered: bool = super()._handle_nan_recovery(epoch)
        _unhook(self.ema.ema)  # a recovered average is a copy of the network that is watched
        return recovered

    def _is_finite(self) -> bool:
        values = [value for value in (self.loss, self.fitness) if value is not None]
        return all(bool(torch.isfinite(torch.as_tensor(value)).all()) for value in values)

    def _begin(self) -> None:
        """Everything is made, and resumed: pruning can begin."""
        if self._target is None:
            return
        given = dict(self._arguments)
        target = self._target if isinstance(self._target, Target) else Target(params=self._target)
        frozen = [name for name, module in self.model.named_modules() if _is_frozen(module)]
        curvature = given.pop("curvature", {})
        if isinstance(curvature, Mapping):
            curvature = {**self._loss_of_task(), **curvature}
        self._pruning = PruneWhileTraining(
            self.model,
            self.optimizer,
            self._example(target),
            target=target,
            total_steps=max(1, len(self.train_loader) * self.epochs // self.accumulate),
            curvature=curvature,
            **{"flatness": False, "ema_models": [self.ema.ema], "exclude": frozen, **given},
        )
        if self.resume:
            self._load_pruning(self._pruning)
        self._judged = self._saved = self._pruning.pruner.params

    def _loss_of_task(self) -> dict[str, Any]:
        """What is known of the loss, which the network computes itself: a sum over images, a classifier's a mean."""
        reduction = "mean" if self.args.task == "classify" else "sum"
        return {"loss": "other", "fisher_type": "empirical", "reduction": reduction, "grad_scale": self._loss_scale}

    def _loss_scale(self) -> Tensor:
        scaled: Tensor = self.scaler.scale(torch.ones((), device=self.device))  # without waiting for the device
        return scaled

    def _example(self, target: Target) -> Tensor:
        """Images of the size of training where the target's unit depends on it, else as small as they may be."""
        side = self.args.imgsz
        if target.unit in ("params", "neurons"):
            side = min(side, _STRIDES * self.stride)
        images = torch.rand(2, self.data["channels"], side, side, generator=torch.Generator().manual_seed(0))
        return images.to(self.device)

    def _load_pruning(self, pruning: PruneWhileTraining) -> None:
        folder = Path(self.args.model).parent
        saved = load_state(folder, "pruning_trainer")
        if saved["epoch"] + 1 != self.start_epoch:
            raise InputError(
                f"{folder / STATE_FILE}: of epoch {saved['epoch'] + 1}, {self.args.model} of epoch {self.start_epoch}; "
                "resume last.pt"
            )
        pruning.load_state_dict({**saved["pruning"], "curvature": pruning.curvature.state_dict()})

    def _end(self) -> None:
        if self._pruning is not None:
            self._pruning.close()


def pruning_trainer(
    yolo: Any, target: Target | float | None, pruning: Mapping[str, Any] | None = None
) -> type[PruningTrainer]:
    """A trainer for `YOLO.train(trainer=...)` that removes neurons while it trains.

    Everything else is Ultralytics': data, augmentation, warm-up, accumulation, mixed precision, the average of the
    weights, validation, files. `best.pt` is the best network of the final size; it and `last.pt` load, predict and
    export as ever, and `train(resume=True)` goes on with the pruned network. To train a pruned network further, give
    such a trainer too (with target=None to prune nothing): Ultralytics' own builds the full size from its
    configuration. The `PruneWhileTraining` is `yolo.trainer.pruning`.

    Args:
        yolo: a `YOLO` of any task.
        target: a `flatprune.Target`, or the fraction of the parameters that shall be left; None: nothing is pruned.
        pruning: more arguments of `flatprune.PruneWhileTraining`, such as {"criterion": "taylor"}. The flatness term
            is off: it needs to know a loss, and that of a detector is none of those known.

    Raises:
        InputError: when training begins, in one line: several devices, `compile`, `distill_model`, `quantize=8` or
            `time`; a pruned network of other classes than the data; a checkpoint whose pruning is not known.

    Example:
        >>> yolo = YOLO("yolov8n.yaml")
        >>> yolo.train(trainer=pruning_trainer(yolo, target=0.5), data="coco8.yaml", epochs=100)
        >>> print(yolo.trainer.pruning.summary())
    """
    own = {"_target": target, "_arguments": dict(pruning or {})}
    return type("PruningTrainer", (PruningTrainer, yolo.task_map[yolo.task]["trainer"]), own)


def _refuse(trainer: Any) -> None:
    if trainer.world_size > 1:
        raise InputError(
            f"PruningTrainer: device={trainer.args.device!r}: Ultralytics starts a process for each of several "
            "devices, which would not prune; give one"
        )
    if getattr(trainer.args, "quantize", None) == 8:
        raise InputError("PruningTrainer: quantize=8: quantizers cannot be cut; train without it, quantize afterwards")
    for name, reason in _UNSUPPORTED.items():
        value = getattr(trainer.args, name, None)
        if value:
            raise InputError(f"PruningTrainer: {name}={value!r}: {reason}")


def _unhook(model: nn.Module) -> None:
    """Take off what a copy of a watched network has of its hook: a file with it would want this package to load."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, ForwardHook):
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)


def _is_frozen(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return bool(own) and not any(parameter.requires_grad for parameter in own)
