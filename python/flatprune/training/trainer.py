"""The training loop: curvature, flatness and pruning along the way, and a state that continues bit for bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from flatprune import models
from flatprune.checkpoint import CHECKPOINT_FORMAT, CHECKPOINT_VERSION
from flatprune.cutting.ema_models import named_tensors
from flatprune.data import Dataset, batch_indices
from flatprune.distributed import agree_on_buffers
from flatprune.errors import DivergedError, InputError, Interrupted
from flatprune.export import take_tensors
from flatprune.flatness.distortion import attach_disout
from flatprune.flatness.sam import SAM, MomentumSAM
from flatprune.flatness.shifting import optimum_shift
from flatprune.pruning.pruner import Pruner
from flatprune.pruning.removals import Removal
from flatprune.settings import Settings
from flatprune.training import builders
from flatprune.training.averaging import AveragedWeights
from flatprune.training.batches import Batches, whole_batch
from flatprune.training.evaluation import evaluate
from flatprune.training.gradients import Gradients
from flatprune.training.measurements import all_radii
from flatprune.training.ranks import StepFlags, TrainingRanks, launch, warn_of_other_number
from flatprune.training.state import EpochSums, LossWatch, Progress, generator_states, load_generators
from flatprune.training.stopping import AccuracyGuard, hold_out

_CHECK_STEPS = 100  # between looks at the loss where looking costs a wait


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


def _attributes(state: dict[str, Any]) -> dict[str, Any]:
    """Numbers that pruning changed in the code of a network, by module."""
    return (state["pruner"] or {}).get("attributes", {})


class Trainer:
    """Trains one network and prunes it on the way.

    Args:
        settings: what to do.
        dataset: what to train and test on, on the device of the settings.
        state: a checkpoint (`flatprune.checkpoint`) to go on from; everything then continues as if never interrupted.
        ranks: that share the training, each with a trainer of its own, or None.

    Attributes:
        model: the network that is trained; `result`: the one that is tested and saved, its average where there is one.
        history: the records of `history.jsonl`.

    Raises:
        InputError: the network does not fit the images, or the checkpoint does not belong to settings and data.
    """

    def __init__(
        self,
        settings: Settings,
        dataset: Dataset,
        state: dict[str, Any] | None = None,
        ranks: TrainingRanks | None = None,
    ) -> None:
        self.ranks = ranks
        if ranks is not None:
            self._number, self._flags = ranks.trainers, StepFlags(ranks.group)
            self._synced = self._gradient_bytes = 0
            dataset = ranks.begin(settings, state, lambda: dataset) if ranks.leads else dataset
        self.settings = settings
        self.guard = None
        if settings.stop_accuracy_drop is not None:
            dataset, x, y = hold_out(dataset, settings.seed)
            self.guard = AccuracyGuard(x, y, settings.stop_accuracy_drop, evaluate)
        if settings.augment and dataset.image_shape[1:] == (1, 1):
            raise InputError(f"augment: images of {dataset.name} are one pixel, as rows of a table are; leave it out")
        self.dataset = dataset
        self.progress = Progress()
        self.history: list[dict[str, Any]] = []
        self.device = settings.torch_device()
        self.sums, self.watch = EpochSums(self.device), LossWatch(self.device)
        self.batch_size = whole_batch(settings, len(dataset.x_train), 1 if ranks is None else ranks.group.size)
        self.steps_per_epoch = len(dataset.x_train) // self.batch_size
        self.total_steps = settings.epochs * self.steps_per_epoch
        torch.manual_seed(settings.seed)
        self._make_model(state)
        self._build()
        if ranks is not None:
            ranks.seed_streams(settings.seed)
        if state is not None:
            self._load(state)
        elif self.pruner is not None:
            builders.check_reachable(self.pruner, settings.model)

    def _make_model(self, state: dict[str, Any] | None) -> None:
        settings, dataset = self.settings, self.dataset
        self.arguments = {
            "name": settings.model,
            "image_shape": list(dataset.image_shape),
            "classes": dataset.classes,
            "widths": None if settings.widths is None else list(settings.widths),
        }
        self.model = self.untrained().to(self.device)
        builders.check_logits(self.model, dataset)
        self.params_before = models.parameter_count(self.model)
        self.macs_before = models.multiply_accumulates(self.model, dataset.x_test[:1])
        self.widths_before = models.layer_widths(self.model)
        if settings.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if state is not None:
            take_tensors(self.model, state["model"], _attributes(state))

    def _build(self) -> None:
        """Everything that acts on the model."""
        settings, model, dataset = self.settings, self.model, self.dataset
        self.peak_lr = settings.peak_lr(models.has_batch_norm(model))
        self.optimizer = builders.make_optimizer(settings, model, self.peak_lr)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp == "fp16")
        self.order_generator = torch.Generator().manual_seed(settings.seed)
        self.batches = Batches(
            dataset.x_train,
            dataset.y_train,
            dataset.classes,
            self.order_generator,
            augment=settings.augment,
            mixup=settings.mixup,
            channels_last=settings.channels_last,
            parts=settings.accumulate,
            own_part=None if self.ranks is None else self.ranks.own_part,
        )
        self.parallel = model
        if self.ranks is not None:
            self.parallel = self.ranks.wrapped(model, self.device, shared_norms=settings.sync_batch_norm)
        self.average = None if settings.ema is None else AveragedWeights(model, settings.ema)
        self.curvature = builders.make_curvature(settings, self.parallel)
        self.flatness = self.msam = self.sam = self.pruner = self.disout = self.compiled = None
        if "on" in settings.flatness_parts:
            self.flatness = builders.make_flatness(settings, self.curvature, self.total_steps)
        if "msam" in settings.flatness_parts:
            self.msam = MomentumSAM(self.parallel, self.optimizer, radius=settings.sam_radius)
        if "sam" in settings.flatness_parts:
            self.sam = SAM(
                self.parallel, radius=settings.sam_radius, every=settings.sam_every, curvature=self.curvature
            )
        if settings.target.fraction < 1.0:
            self.pruner = builders.make_pruner(
                settings, self.parallel, self.optimizer, self.curvature, dataset, self.total_steps, self.average
            )
        if settings.disout > 0.0:
            self.disout = attach_disout(model, probability=settings.disout, steps=self.total_steps)
        if settings.compile:
            if self.ranks is not None:
                raise InputError("compile: not with several ranks; leave it out")
            self.compiled = builders.Compiled(model, self.curvature)
        self.gradients = Gradients(
            self.compiled or self.parallel,
            nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing),
            self.device,
            settings.amp,
            self.scaler,
            self.flatness,
            self.sam,
            self.msam,
            self._check_loss,
            getattr(self.parallel, "no_sync", nullcontext),
        )

    def traffic(self) -> dict[str, Any]:
        """What several ranks have told each other, by purpose; empty for one process."""
        if self.ranks is None:
            return {}
        groups = [self.curvature.group, None if self.sam is None else self.sam.group]
        pruning = None if self.pruner is None else self.pruner.group
        kept = {id(group): group for group in (*groups, pruning)}  # most are one and the same
        gradients = {"calls": self._synced, "bytes": self._gradient_bytes, "seconds": None}  # DDP waits by itself
        return {
            "ranks": self.ranks.group.size,
            "traffic": {"gradients": gradients, **self.ranks.traffic(kept.values())},
        }

    def untrained(self) -> nn.Module:
        """The network before its first step, on the CPU."""
        return builders.untrained(self.settings, self.arguments)

    @property
    def result(self) -> nn.Module:
        """The network that is tested and saved."""
        return self.model if self.average is None else self.average.module

    @property
    def params(self) -> int:
        """Parameters of the network as it is now."""
        return models.parameter_count(self.model)

    def state(self) -> dict[str, Any]:
        """The content of `checkpoint.pt`, of all ranks together; see `flatprune.checkpoint`."""
        ranks, parts = self.ranks, self._stateful()
        states: dict[str, Any] = {n: None if part is None else part.state_dict() for n, part in parts.items()}
        sums, streams = self.sums.state_dict(), generator_states(self.device, self.order_generator)
        if ranks is not None:
            if not ranks.are_apart:
                ranks.announce("state", self._number)
            states["curvature"]["recent_calls"] = ranks.whole_calls(states["curvature"]["recent_calls"])
            sums, streams = ranks.whole_sums(sums), ranks.all_streams(streams)
        return {
            "format": CHECKPOINT_FORMAT,
            "version": CHECKPOINT_VERSION,
            "settings": self.settings.as_dict(),
            "data_digest": self.dataset.digest,
            "launch": launch()[0],
            "progress": {**vars(self.progress), **sums},
            "history": self.history,
            "model": self.model.state_dict(),
            "ema": None if self.average is None else self.average.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **states,
            "rng": streams,
        }

    def _load(self, state: dict[str, Any]) -> None:
        """Go on from `state`, with the model's tensors taken already."""
        if state["data_digest"] != self.dataset.digest:
            name = self.dataset.name
            raise InputError(f"{name}: not the data of the checkpoint; a run resumes only on the same data")
        if self.average is not None:
            take_tensors(self.average.module, state["ema"], _attributes(state))
        fused = builders.fused_optimizer(self.device)  # the device may be another one than before
        groups = [{**group, "fused": fused} for group in state["optimizer"]["param_groups"]]
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        if self.ranks is not None:
            state = self.ranks.own_state(state)
        elif len(state["rng"].get("ranks", ())) > 1:
            warn_of_other_number(len(state["rng"]["ranks"]), 1)
        for name, part in self._stateful().items():
            if part is not None:
                part.load_state_dict(state[name])
        sums = {name: state["progress"][name] for name in self.sums.state_dict()}
        self.sums.load_state_dict(sums)
        self.progress = Progress(**{name: value for name, value in state["progress"].items() if name not in sums})
        if self.guard is not None:
            self.guard.best = self.progress.best_held_out
        if self.progress.order is not None:
            self.progress.order = self.progress.order.cpu()
        self.history = list(state["history"])
        load_generators(state["rng"], self.device, self.order_generator)

    def _stateful(self) -> dict[str, Any]:
        """Name in the checkpoint -> what has a state of its own, or None where the run does without."""
        return {
            "scaler": self.scaler if self.scaler.is_enabled() else None,
            "curvature": self.curvature,
            "flatness": self.flatness,
            "sam": self.sam,
            "disout": self.disout,
            "pruner": self.pruner,
        }

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
            DivergedError: the loss is not finite any more; `save` has not been called since it was. On a GPU this is
                noticed within 100 steps, so that no step waits for it.
        """
        observer = observer or Observer()
        with nullcontext() if self.ranks is None else self.ranks.training(self._number):
            observer.start(self)
            try:
                while self.progress.epoch < self.settings.epochs:
                    self._train_epoch(observer, save, stop_requested)
                    observer.epoch(self._close_epoch())
                    self._save(save)
            finally:
                observer.stop()

    def _save(self, save: Callable[[], None]) -> None:
        with nullcontext() if self.ranks is None else self.ranks.together():
            save()

    def _train_epoch(self, observer: Observer, save: Callable[[], None], stop_requested: Callable[[], bool]) -> None:
        progress = self.progress
        if progress.order is None:
            progress.order = torch.randperm(len(self.dataset.x_train), generator=self.order_generator)
        self.model.train()
        clock = time.perf_counter()
        for index in batch_indices(progress.order.to(self.device), self.batch_size, progress.batch):
            for record in self._train_step(index):
                observer.removal(record)
            if progress.step % _CHECK_STEPS == 0:
                self._refuse_bad_loss()
            now = time.perf_counter()
            progress.seconds += now - clock
            clock = now
            observer.step(self)
            if self._must_stop(stop_requested()):
                self._refuse_bad_loss()
                self._save(save)
                raise Interrupted(f"stopped at step {progress.step} of {self.total_steps}")

    def _must_stop(self, stop: bool) -> bool:
        """Whether it is time to stop; ranks say so to each other, and hear a step later, of bad losses too."""
        if self.ranks is None:
            return stop
        stop, loss = self._flags.exchange(stop, self.watch.value() if self.watch.is_free else 0.0)
        self._refuse_loss(loss, self.progress.step - 1)
        return stop

    def _train_step(self, index: Tensor) -> list[dict[str, Any]]:
        progress = self.progress
        left = models.parameter_count(self.model) / self.params_before
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate(progress.step, self.total_steps, self.peak_lr, left)
        self.optimizer.zero_grad()
        self.gradients.compute(self.batches.of(index), self.sums)
        if self.ranks is not None:
            self._synced += 1
            self._gradient_bytes += sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.model, progress.step)
        removals = self._prune()
        if self.disout is not None:
            self.disout.step()
        progress.step += 1
        progress.batch += 1
        records = [self._log_removal(removal) for removal in removals]
        self._shift_optimum()
        return records

    def _shift_optimum(self) -> None:
        """Once, after the last removal; without pruning at the same step."""
        schedule = builders.make_schedule(self.settings, self.total_steps)
        if self.settings.optimum_shift == "off" or not schedule.is_last(self.progress.step):
            return
        where = {"kind": "optimum_shift", "epoch": self.progress.epoch + 1, "step": self.progress.step}
        before = {name: tensor.detach().clone() for name, tensor in named_tensors(self.model).items()}
        shifts = optimum_shift(self.parallel, torch.cat([call.args[0] for call in self.curvature.recent_calls]))
        if self.average is not None:
            self.average.move_along(before, self.model)
        self.history += [{**where, **shift._asdict()} for shift in shifts]

    def _check_loss(self, loss: Tensor) -> None:
        """Refuse a loss that is not finite: at once where looking at it is free."""
        self.watch.add(loss)
        if self.watch.is_free and self.ranks is None:
            self._refuse_bad_loss()

    def _refuse_bad_loss(self) -> None:
        if self.ranks is None:
            self._refuse_loss(self.watch.value(), self.progress.step + 1)
            return
        self._flags.hear()
        (total,) = self.ranks.sums([self.watch.value()], "flags")
        self._refuse_loss(total, self.progress.step)

    def _refuse_loss(self, value: float, found_at: int) -> None:
        if not math.isfinite(value):
            step = f"at step {found_at}" if self.watch.is_free else f"by step {self.progress.step}"
            raise DivergedError(
                f"the loss became {value} {step} (epoch {self.progress.epoch + 1}); "
                f"a lower learning rate than {self.peak_lr:g} may help"
            )

    def _prune(self) -> list[Removal]:
        if self.pruner is None:
            return []
        clock = time.perf_counter() if self.pruner.is_event() else None
        try:
            removals = [*self._stopped(self.pruner), *self.pruner.step()]
        except ValueError as error:  # factors or scores that are not finite
            raise DivergedError(f"{error} (step {self.progress.step + 1})") from error
        if clock is not None:
            self.progress.removal_seconds += time.perf_counter() - clock
        if self.compiled is not None and any(removal.kind == "removal" for removal in removals):
            self.compiled.renew()
        return removals

    def _stopped(self, pruner: Pruner) -> list[Removal]:
        """Before a removal event, end pruning if the held-out images demand it."""
        if self.guard is None or not pruner.is_event():
            return []
        reason = "" if self.ranks is not None and not self.ranks.leads else self.guard.objection(self.result)
        if self.ranks is not None:
            reason, self.guard.best = self.ranks.group.first((reason, self.guard.best), "held-out images")
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

    def _test(self) -> tuple[float | None, float | None]:
        """Accuracy and loss on the test images after an epoch, None after one that is not to be tested."""
        progress, settings = self.progress, self.settings
        if progress.epoch % settings.test_every and progress.epoch != settings.epochs:
            return None, None
        accuracy, loss = self._evaluated()
        if not math.isfinite(loss):
            raise DivergedError(f"the test loss became {loss} after epoch {progress.epoch}")
        progress.best_accuracy = max(progress.best_accuracy, accuracy)
        return accuracy, loss

    def _evaluated(self) -> tuple[float, float]:
        """Accuracy and loss on the test images, of which each rank takes a part."""
        x, y, ranks = self.dataset.x_test, self.dataset.y_test, self.ranks
        if ranks is None:
            return evaluate(self.result, x, y)
        if self.average is not None:
            ranks.group.first_(self.result.buffers(), "other buffers")
        own = slice(len(x) * ranks.group.rank // ranks.group.size, len(x) * (ranks.group.rank + 1) // ranks.group.size)
        accuracy, loss = evaluate(self.result, x[own], y[own]) if own.start < own.stop else (0.0, 0.0)
        count = own.stop - own.start
        accuracy, loss = ranks.sums([accuracy * count, loss * count], "test")
        return accuracy / len(x), loss / len(x)

    def _close_epoch(self) -> dict[str, Any]:
        progress = self.progress
        clock = time.perf_counter()
        self._refuse_bad_loss()
        if self.ranks is not None:
            agree_on_buffers(self.model, self.ranks.group)
        progress.epoch += 1
        accuracy, loss = self._test()
        progress.seconds += time.perf_counter() - clock
        summed = (lambda values: values) if self.ranks is None else (lambda v: self.ranks.sums(v, "figures"))
        train_loss, train_accuracy = self.sums.figures(summed)
        record = {
            "kind": "epoch",
            "epoch": progress.epoch,
            "step": progress.step,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "test_loss": loss,
            "test_accuracy": accuracy,
            "params": self.params,
            "params_fraction": self.params / self.params_before,
            "spectral_radius": float(self.curvature.spectral_radius()),
            "spectral_radius_geometric_mean": float(self.curvature.geometric_mean_radius()),
            "seconds": progress.seconds,
            **self._tracked_radii(),
        }
        self.history.append(record)
        progress.order, progress.batch = None, 0
        self.sums.reset()
        return record

    def _tracked_radii(self) -> dict[str, float]:
        """The true radius and K-FAC radii of both kinds; empty after epochs that do not ask for it."""
        every, epoch = self.settings.track_hessian, self.progress.epoch
        if not every or (epoch % every and epoch != self.settings.epochs):
            return {}
        return all_radii(self.result, self.curvature, self.dataset, self.settings.seed)
