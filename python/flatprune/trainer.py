"""The training loop: curvature, flatness and pruning along the way, and a state that continues bit for bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flatprune import models
from flatprune.checkpoint import CHECKPOINT_FORMAT, CHECKPOINT_VERSION
from flatprune.data import Dataset, augmented, batch_indices
from flatprune.distortion import disout
from flatprune.errors import DivergedError, InputError, Interrupted
from flatprune.export import fresh_network, take_tensors
from flatprune.goals import check_reachable, target_figures
from flatprune.measurements import (
    calibration,
    corruption_accuracies,
    latency_figures,
    predictions,
    radii_of_both_kinds,
)
from flatprune.pruner import Pruner
from flatprune.removals import Removal
from flatprune.sam import SAM, MomentumSAM
from flatprune.schedule import CubicSchedule
from flatprune.settings import MOMENTUM, WEIGHT_DECAY, Settings
from flatprune.shifting import optimum_shift
from flatprune.spectrum import Flatness, hessian_lambda_max
from flatprune.stopping import AccuracyGuard, hold_out
from kfac_ext.curvature import Curvature

_EVALUATION_BATCH = 1000
_HESSIAN_SAMPLES = 1024
_HESSIAN_ITERATIONS = 50
_EXAMPLES = 2  # images the pruner traces the network with


@dataclass
class Progress:
    """Where the run stands; all that a checkpoint must know besides tensors and generators.

    Attributes:
        epoch: epochs that are complete.
        step: optimizer steps taken.
        batch: batches of the running epoch that are done.
        order: the running epoch's order of the samples, or None between epochs.
        loss_sum, correct, seen: sums over the running epoch.
        seconds: time spent in training and testing so far.
        best_accuracy: highest test accuracy after any epoch, in percent.
        best_held_out: highest accuracy on held-out images at any removal event, in percent; None before the first one.
    """

    epoch: int = 0
    step: int = 0
    batch: int = 0
    order: Tensor | None = None
    loss_sum: float = 0.0
    correct: int = 0
    seen: int = 0
    seconds: float = 0.0
    best_accuracy: float = 0.0
    best_held_out: float | None = None


class Observer:
    """Told about a run while it goes on; the methods do nothing unless overridden."""

    def start(self, trainer: Trainer) -> None:
        """Training begins or goes on."""

    def step(self, trainer: Trainer) -> None:
        """An optimizer step is done."""

    def removal(self, record: dict[str, Any]) -> None:
        """Neurons were removed, or an event removed none, or pruning was stopped, by `record["kind"]`."""

    def epoch(self, record: dict[str, Any]) -> None:
        """An epoch is done and tested."""

    def stop(self) -> None:
        """Training ended, was stopped or failed."""


class Trainer:
    """Trains one network and prunes it on the way.

    Args:
        settings: what to do.
        dataset: what to train and test on, on the device of the settings.
        state: a checkpoint (`state_dict`) to go on from; everything then continues as if never interrupted.

    Raises:
        InputError: the network does not fit the images, or the checkpoint does not belong to settings and data.
    """

    def __init__(self, settings: Settings, dataset: Dataset, state: dict[str, Any] | None = None) -> None:
        self.settings = settings
        self.guard = None
        if settings.stop_accuracy_drop is not None:
            dataset, x, y = hold_out(dataset, settings.seed)
            self.guard = AccuracyGuard(x, y, settings.stop_accuracy_drop, evaluate)
        self.dataset = dataset
        self.progress = Progress()
        self.history: list[dict[str, Any]] = []
        self.device = settings.torch_device()
        self.batch_size = min(settings.batch_size, len(dataset.x_train))
        self.steps_per_epoch = len(dataset.x_train) // self.batch_size
        self.total_steps = settings.epochs * self.steps_per_epoch
        torch.manual_seed(settings.seed)
        self.arguments = {
            "name": settings.model,
            "image_shape": list(dataset.image_shape),
            "classes": dataset.classes,
            "widths": None if settings.widths is None else list(settings.widths),
        }
        self.model = self._untrained()
        self.model.to(self.device)
        self.params_before = models.parameter_count(self.model)
        self.flops_before = models.multiply_accumulates(self.model, dataset.image_shape)
        self.widths_before = models.layer_widths(self.model)
        if state is not None:
            take_tensors(self.model, state["model"])
        self.peak_lr = settings.lr or (0.1 if models.has_batch_norm(self.model) else 0.05)
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(parameter_groups(self.model), lr=self.peak_lr, momentum=MOMENTUM)
        self.order_generator = torch.Generator().manual_seed(settings.seed)
        self.curvature = Curvature(
            self.model,
            factor_update_steps=settings.factor_update_steps,
            generator=torch.Generator().manual_seed(settings.seed),
        )
        self.flatness = self._flatness() if settings.flatness == "on" else None
        self.msam = None
        if settings.flatness == "msam":
            self.msam = MomentumSAM(self.model, self.optimizer, radius=settings.sam_radius)
        self.sam = None
        if settings.flatness == "sam":
            self.sam = SAM(self.model, radius=settings.sam_radius, every=settings.sam_every, curvature=self.curvature)
        self.pruner = self._pruner() if settings.target.share < 1.0 else None
        self.disout = None
        if settings.disout > 0.0:
            self.disout = disout(self.model, probability=settings.disout, steps=self.total_steps)
        if state is not None:
            self._load_state_dict(state)
        elif self.pruner is not None:
            check_reachable(self.pruner, settings.model)

    def _flatness(self) -> Flatness:
        given = {name: getattr(self.settings, f"flatness_{name}") for name in ("strength", "every", "fade_below")}
        chosen = {name: value for name, value in given.items() if value is not None}
        return Flatness(self.curvature, total_steps=self.total_steps, mode=self.settings.flatness_mode, **chosen)

    def _untrained(self) -> nn.Module:
        """The network before its first step, on the CPU."""
        settings, dataset = self.settings, self.dataset
        if settings.architecture_of is not None:
            return fresh_network(settings.architecture_of, self.arguments)
        return models.build(settings.model, dataset.image_shape, dataset.classes, settings.widths)

    def _schedule(self) -> CubicSchedule:
        settings = self.settings
        return CubicSchedule(self.total_steps, settings.prune_start, settings.prune_end, settings.prune_every)

    def _pruner(self) -> Pruner:
        settings = self.settings
        compensate = "auto" if settings.compensate == "auto" else settings.compensate == "on"
        try:
            return Pruner(
                self.model,
                self.optimizer,
                self.curvature,
                self.dataset.x_train[:_EXAMPLES],
                target=settings.target,
                total_steps=self.total_steps,
                schedule=self._schedule(),
                criterion=settings.criterion,
                compensate=compensate,
                selection=settings.selection,
                seed=settings.seed,
                round_to=settings.round_to,
                min_width=settings.min_width,
                max_predicted_loss=settings.max_predicted_loss,
                exclude=settings.exclude,
            )
        except (KeyError, ValueError) as error:  # a layer that is not there or cannot be pruned
            raise InputError(str(error.args[0])) from error

    @property
    def params(self) -> int:
        """Parameters of the network as it is now."""
        return models.parameter_count(self.model)

    def train(
        self,
        observer: Observer | None = None,
        save: Callable[[], None] = lambda: None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        """Train until all epochs are done.

        Args:
            observer: told about each step, removal and epoch.
            save: called after every epoch and before stopping early.
            stop_requested: asked after every step.

        Raises:
            Interrupted: `stop_requested` said so; `save` has been called.
            DivergedError: the loss is not finite any more; `save` has not been called since it was.
        """
        observer = observer or Observer()
        observer.start(self)
        try:
            while self.progress.epoch < self.settings.epochs:
                self._train_epoch(observer, save, stop_requested)
                observer.epoch(self._close_epoch())
                save()
        finally:
            observer.stop()

    def _train_epoch(self, observer: Observer, save: Callable[[], None], stop_requested: Callable[[], bool]) -> None:
        progress = self.progress
        if progress.order is None:
            progress.order = torch.randperm(len(self.dataset.x_train), generator=self.order_generator)
        self.model.train()
        clock = time.perf_counter()
        for index in batch_indices(progress.order, self.batch_size, progress.batch):
            for record in self._train_step(index.to(self.device)):
                observer.removal(record)
            now = time.perf_counter()
            progress.seconds += now - clock
            clock = now
            observer.step(self)
            if stop_requested():
                save()
                raise Interrupted(f"stopped at step {progress.step} of {self.total_steps}")

    def _train_step(self, index: Tensor) -> list[dict[str, Any]]:
        progress = self.progress
        x, y = self.dataset.x_train[index], self.dataset.y_train[index]
        if self.settings.augment:
            x = augmented(x, self.order_generator)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate(progress.step, self.total_steps, self.peak_lr)
        self.optimizer.zero_grad()
        with self._moved():
            logits = self.model(x)
            loss = self.criterion(logits, y)
            objective = loss if self.flatness is None else loss + self.flatness.penalty(x, logits, loss)
            self._check_loss(objective)
            objective.backward()
        if self.sam is not None:
            self._check_loss(self.sam.replace_gradients(lambda: self.criterion(self.model(x), y)))
        self.optimizer.step()
        removals = self._prune()
        if self.disout is not None:
            self.disout.step()
        progress.step += 1
        progress.batch += 1
        progress.loss_sum += float(loss.detach()) * len(y)
        progress.correct += int((logits.detach().argmax(1) == y).sum())
        progress.seen += len(y)
        records = [self._log_removal(removal) for removal in removals]
        self._shift_optimum()
        return records

    def _moved(self) -> AbstractContextManager[None]:
        return nullcontext() if self.msam is None else self.msam.moved()

    def _shift_optimum(self) -> None:
        """Once, after the last removal; without pruning at the same step."""
        if self.settings.optimum_shift == "off" or not self._schedule().is_last(self.progress.step):
            return
        where = {"kind": "optimum_shift", "epoch": self.progress.epoch + 1, "step": self.progress.step}
        shifts = optimum_shift(self.model, torch.cat(self.curvature.recent_inputs))
        self.history += [{**where, **shift._asdict()} for shift in shifts]

    def _check_loss(self, loss: Tensor | None) -> None:
        value = 0.0 if loss is None else float(loss.detach())
        if not math.isfinite(value):
            raise DivergedError(
                f"the loss became {value} at step {self.progress.step + 1} (epoch {self.progress.epoch + 1}); "
                f"a lower learning rate than {self.peak_lr:g} may help"
            )

    def _prune(self) -> list[Removal]:
        try:
            return [] if self.pruner is None else [*self._stopped(self.pruner), *self.pruner.step()]
        except ValueError as error:  # factors or scores that are not finite
            raise DivergedError(f"{error} (step {self.progress.step + 1})") from error

    def _stopped(self, pruner: Pruner) -> list[Removal]:
        """Before a removal event, end pruning if the held-out images demand it."""
        if self.guard is None or not pruner.is_event():
            return []
        reason = self.guard.objection(self.model)
        self.progress.best_held_out = self.guard.best
        return [pruner.stop(reason)] if reason else []

    def _log_removal(self, removal: Removal) -> dict[str, Any]:
        record = {
            "epoch": self.progress.epoch + 1,
            **removal.explanation(),
            "width": removal.width_after,
            "params": removal.params_after,
        }
        self.history.append(record)
        return record

    def _close_epoch(self) -> dict[str, Any]:
        progress = self.progress
        clock = time.perf_counter()
        accuracy, loss = evaluate(self.model, self.dataset.x_test, self.dataset.y_test)
        if not math.isfinite(loss):
            raise DivergedError(f"the test loss became {loss} after epoch {progress.epoch + 1}")
        progress.best_accuracy = max(progress.best_accuracy, accuracy)
        progress.epoch += 1
        progress.seconds += time.perf_counter() - clock
        params = self.params
        record = {
            "kind": "epoch",
            "epoch": progress.epoch,
            "step": progress.step,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "train_loss": progress.loss_sum / progress.seen,
            "train_accuracy": 100.0 * progress.correct / progress.seen,
            "test_loss": loss,
            "test_accuracy": accuracy,
            "params": params,
            "params_fraction": params / self.params_before,
            "spectral_radius": float(self.curvature.spectral_radius()),
            "spectral_radius_geometric_mean": float(self.curvature.geometric_mean_radius()),
            "seconds": progress.seconds,
            **self._tracked(progress.epoch),
        }
        self.history.append(record)
        progress.order, progress.batch = None, 0
        progress.loss_sum, progress.correct, progress.seen = 0.0, 0, 0
        return record

    def _tracked(self, epoch: int) -> dict[str, float]:
        """The true radius beside the estimates, in the epochs in which it is asked for."""
        every = self.settings.track_hessian
        if every is None or (epoch % every and epoch != self.settings.epochs):
            return {}
        x = self.dataset.x_train[:_HESSIAN_SAMPLES]
        radii = radii_of_both_kinds(self.model, self.curvature, x, self.settings.seed)
        return {"hessian_lambda_max": self.hessian_lambda_max(), **radii}

    def results(self) -> dict[str, Any]:
        """The figures of `summary.json` that describe the network as it is now (see `flatprune.runs`)."""
        train_accuracy, _ = evaluate(self.model, self.dataset.x_train, self.dataset.y_train)
        test_accuracy, _ = evaluate(self.model, self.dataset.x_test, self.dataset.y_test)
        return {
            "params_before": self.params_before,
            "params_after": self.params,
            "flops_before": self.flops_before,
            "flops_after": models.multiply_accumulates(self.model, self.dataset.image_shape),
            "test_accuracy_last": test_accuracy,
            "test_accuracy_best": self.progress.best_accuracy,
            "train_accuracy_last": train_accuracy,
            "spectral_radius_kfac": float(self.curvature.spectral_radius()),
            "spectral_radius_kfac_geometric_mean": float(self.curvature.geometric_mean_radius()),
            "hessian_lambda_max": self.hessian_lambda_max(),
            "widths_before": self.widths_before,
            "widths_after": models.layer_widths(self.model),
            "seconds": self.progress.seconds,
            **target_figures(self.settings.target, self.pruner, self.history),
            **self._measurements(),
        }

    def _measurements(self) -> dict[str, Any]:
        settings, dataset = self.settings, self.dataset
        found: dict[str, Any] = calibration(predictions(self.model, dataset.x_test), dataset.y_test)
        if settings.corruptions:
            found |= corruption_accuracies(self.model, dataset)
        if settings.measure_latency:
            before = self._untrained().to(self.device)
            found |= latency_figures(before, self.model, dataset.x_test[:1])
        return found

    def hessian_lambda_max(self) -> float:
        """Largest eigenvalue of the Hessian of the mean training loss over the first 1,024 training images."""
        x, y = self.dataset.x_train[:_HESSIAN_SAMPLES], self.dataset.y_train[:_HESSIAN_SAMPLES]
        generator = torch.Generator(self.device).manual_seed(self.settings.seed)
        return float(
            hessian_lambda_max(self.model, x, y, self.criterion, iterations=_HESSIAN_ITERATIONS, generator=generator)
        )

    def state_dict(self) -> dict[str, Any]:
        """The content of `checkpoint.pt`; see `flatprune.checkpoint`."""
        return {
            "format": CHECKPOINT_FORMAT,
            "version": CHECKPOINT_VERSION,
            "settings": self.settings.as_dict(),
            "data_digest": self.dataset.digest,
            "progress": dict(vars(self.progress)),
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "curvature": self.curvature.state_dict(),
            "flatness": None if self.flatness is None else self.flatness.state_dict(),
            "sam": None if self.sam is None else self.sam.state_dict(),
            "disout": None if self.disout is None else self.disout.state_dict(),
            "pruner": None if self.pruner is None else self.pruner.state_dict(),
            "rng": {
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
                "order": self.order_generator.get_state(),
            },
        }

    def _load_state_dict(self, state: dict[str, Any]) -> None:
        if state["data_digest"] != self.dataset.digest:
            raise InputError(
                f"{self.dataset.name}: not the data of the checkpoint; a run resumes only on the same data"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        self.curvature.load_state_dict(state["curvature"])
        if self.flatness is not None:
            self.flatness.load_state_dict(state["flatness"])
        if self.sam is not None:
            self.sam.load_state_dict(state["sam"])
        if self.disout is not None:
            self.disout.load_state_dict(state["disout"])
        if self.pruner is not None:
            self.pruner.load_state_dict(state["pruner"])
        self.progress = Progress(**state["progress"])
        if self.guard is not None:
            self.guard.best = self.progress.best_held_out
        if self.progress.order is not None:
            self.progress.order = self.progress.order.cpu()
        self.history = list(state["history"])
        rng = state["rng"]
        torch.set_rng_state(rng["torch"].cpu())
        self.order_generator.set_state(rng["order"].cpu())
        if rng["cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(rng["cuda"].cpu(), self.device)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two optimizer groups: weights, with weight decay, and biases and batch norm, without."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Accuracy in percent and mean cross entropy of `model`, in evaluation mode; its mode is restored.

    Args:
        model: maps a batch of x to logits [n, classes].
        x: inputs [n, ...].
        y: labels [n].
    """
    training = model.training
    model.eval()
    correct = 0
    loss = 0.0
    for start in range(0, len(x), _EVALUATION_BATCH):
        logits = model(x[start : start + _EVALUATION_BATCH])
        labels = y[start : start + _EVALUATION_BATCH]
        correct += int((logits.argmax(1) == labels).sum())
        loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
    model.train(training)
    return 100.0 * correct / len(x), loss / len(x)
