"""Lightning: a callback that prunes a network while a `Trainer` trains it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_map

from flatprune.cutting.ema_models import unwrapped
from flatprune.errors import InputError
from flatprune.integrations.examples import first_samples
from flatprune.integrations.shapes import shapes_of, take_shapes
from flatprune.prune_while_training import PruneWhileTraining
from flatprune.pruning.targets import Target
from kfac_ext.curvature.recent import Call


class PruningCallback(Callback):
    """Neurons go while the Trainer trains, with automatic or manual optimization, accumulation and mixed precision.

    The first batch shows how the network is called; from the second on its curvature is followed. Checkpoints hold all
    that pruning needs: `trainer.fit(module, ckpt_path=...)` goes on with the pruned network; so does `load_pruned`.
    The Trainer's loggers are told of each event, and after each epoch of sizes, widths and spectral radius. Averages of
    the module that other callbacks keep as a copy of it (`EMAWeightAveraging`, `StochasticWeightAveraging`) are cut
    along; those of your own are named in `pruning={"ema_models": [...]}`.

    Args:
        target: a `flatprune.Target`, or the fraction of the parameters that shall be left.
        network: name of the part of the module that is pruned, such as "model"; None: the only child that has
            parameters.
        pruning: more arguments of `flatprune.PruneWhileTraining`.

    Raises:
        InputError: several processes, or a strategy that shards; no part or several that could be meant; one that is
            trained without being called itself.

    Example:
        >>> trainer = lightning.Trainer(max_epochs=10, callbacks=[PruningCallback(target=0.3, network="model")])
        >>> trainer.fit(module, loader)
    """

    def __init__(
        self, target: Target | float, network: str | None = None, pruning: Mapping[str, Any] | None = None
    ) -> None:
        self._pruning: PruneWhileTraining | None = None
        self._target, self._name, self._arguments = target, network, dict(pruning or {})
        self._network: nn.Module | None = None
        self._call: tuple[Call, Any] | None = None
        self._examples: Any = None
        self._inside: list[str] = []  # averages in the module
        self._handle: Any = None
        self._steps = 0
        self._saved: Mapping[str, Any] | None = None

    @property
    def pruning(self) -> PruneWhileTraining:
        """The `PruneWhileTraining`; raises InputError before training has begun."""
        if self._pruning is None:
            raise InputError("PruningCallback: nothing is pruned before training has begun")
        return self._pruning

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the network the shapes of the checkpoint that training goes on from, before its tensors are loaded."""
        if stage != "fit":
            return
        strategy = type(trainer.strategy).__name__
        if any(name in strategy for name in ("FSDP", "DeepSpeed", "XLA", "ModelParallel")):
            raise InputError(f"PruningCallback: {strategy} shards parameters, which cannot be cut; use another")
        if trainer.world_size > 1:
            raise InputError(
                f"PruningCallback: each of {trainer.world_size} processes ({strategy}) would lose neurons of its own; "
                "train in one process, or in a loop of your own (docs/distributed.md)"
            )
        network = self._network = _part(pl_module, self._name)
        load = pl_module.on_load_checkpoint

        def load_shapes_first(checkpoint: dict[str, Any]) -> None:
            saved = checkpoint.get("callbacks", {}).get(self.state_key)
            if saved:
                for model in (network, *(unwrapped(network, copy) for copy in self._averages(trainer, pl_module))):
                    take_shapes(model, saved["shapes"], "the checkpoint")
            load(checkpoint)

        # the only hook that Lightning calls between reading a checkpoint and loading the module's tensors
        pl_module.on_load_checkpoint = load_shapes_first  # type: ignore[method-assign]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The checkpoint is loaded: the module's hook is its own again."""
        pl_module.__dict__.pop("on_load_checkpoint", None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch how the network is called."""
        assert self._network is not None
        self._handle = self._network.register_forward_hook(self._look, with_kwargs=True)
        self._steps = trainer.global_step
        if self._saved is not None:
            self._begin(trainer, pl_module, self._saved["examples"])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin to prune once a call of the network has been seen."""
        if self._pruning is None and self._call is not None:
            call, _ = self._call
            self._call = None
            self._begin(trainer, pl_module, first_samples((call.args, dict(call.kwargs))))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Add the flatness term to the loss."""
        if self._pruning is not None and self._call is not None:
            call, output = self._call
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            scale = (1.0 if scaler is None else scaler.get_scale()) / trainer.accumulate_grad_batches
            loss.add_(self._pruning.penalty(call, output, loss.clone() / scale) * scale)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the optimizer's step, if there was one.

        Raises:
            InputError: the network is trained, and nothing has called it.
        """
        if self._pruning is None and self._call is None:
            self._refuse_uncalled()
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            if self._pruning is not None:
                self._pruning.step()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the network is, by `log_dict`: for loggers, the progress bar's callbacks and early stopping."""
        if self._pruning is not None:
            pl_module.log_dict(self._pruning.scalars())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take all hooks off the network."""
        if self._handle is not None:
            self._handle.remove()
        if self._pruning is not None:
            self._pruning.close()

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        if self._pruning is None or self._network is None:
            return {}
        shapes = shapes_of(self._network)
        pruning = self._pruning.state_dict()
        return {"shapes": shapes, "averages": self._inside, "pruning": pruning, "examples": self._examples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what a checkpoint holds until training begins."""
        self._saved = state_dict or None

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        watched = self._pruning is None or not self._pruning.curvature.is_paused
        if module.training and torch.is_grad_enabled() and watched:
            self._call = Call.of(args, kwargs, 0), output

    def _averages(self, trainer: Trainer, pl_module: LightningModule) -> list[nn.Module]:
        """Copies of the network: those that are named, and those in copies of the module that callbacks hold."""
        held = [value for callback in trainer.callbacks for value in vars(callback).values()]  # type: ignore[attr-defined]
        held = [value.module if isinstance(value, AveragedModel) else value for value in held]
        copies = [value for value in held if type(value) is type(pl_module) and value is not pl_module]
        return [*self._arguments.get("ema_models", ()), *(_part(copy, self._name) for copy in copies)]

    def _refuse_uncalled(self) -> None:
        assert self._network is not None
        if any(parameter.grad is not None for parameter in self._network.parameters()):
            raise InputError(
                f"PruningCallback: {self._name or 'the network'} is trained, but not by a call of the module itself: a "
                "method of it is called, or what torch.compile has made of it; name the part that is called, uncompiled"
            )

    def _begin(self, trainer: Trainer, pl_module: LightningModule, examples: Any) -> None:
        assert self._network is not None
        self._examples = examples
        averages = self._averages(trainer, pl_module)
        copies = [unwrapped(self._network, average) for average in averages]
        self._inside = [name for name, part in pl_module.named_modules() if any(part is copy for copy in copies)]
        args, kwargs = tree_map(lambda v: v.to(trainer.strategy.root_device) if isinstance(v, Tensor) else v, examples)
        optimizers = trainer.optimizers
        self._pruning = PruneWhileTraining(
            self._network,
            optimizers[0] if len(optimizers) == 1 else optimizers,
            (tuple(args), kwargs),
            target=self._target,
            total_steps=int(trainer.estimated_stepping_batches),
            accumulate=trainer.accumulate_grad_batches,
            **{"logger": _TrainersLoggers(trainer), **self._arguments, "ema_models": averages},
        )
        if self._saved is not None:
            self._pruning.load_state_dict(self._saved["pruning"])
        else:
            self._pruning.pruner.step_count = self._steps


class _TrainersLoggers:
    """Tells the loggers of a Trainer of each event; `log_dict` would leave out most, as it does every step's values."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """At the step's number."""
        for logger in self._trainer.loggers:
            logger.log_metrics(dict(scalars), step)


def _part(module: nn.Module, name: str | None) -> nn.Module:
    if name is not None:
        return module.get_submodule(name)
    parts = [name for name, child in module.named_children() if any(True for _ in child.parameters())]
    if len(parts) != 1:
        raise InputError(f"PruningCallback: network is None and the module has {parts or 'no part'}; name the network")
    return module.get_submodule(parts[0])


def load_pruned(module: LightningModule, path: str | Path, network: str | None = None) -> LightningModule:
    """Give a module of the full size the pruned network, and all other tensors, of a checkpoint.

    Args:
        module: built as it was for training; changed in place and returned, in evaluation mode.
        path: the checkpoint, written with a `PruningCallback`.
        network: as for `PruningCallback`.

    Raises:
        InputError: the checkpoint knows of no pruning, or is of another network.

    Example:
        >>> module = load_pruned(MyModule(), "checkpoints/last.ckpt", network="model")
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    found = [state for state in checkpoint.get("callbacks", {}).values() if "shapes" in state and "pruning" in state]
    if not found:
        raise InputError(f"{path}: no PruningCallback has written to this checkpoint")
    for model in (_part(module, network), *map(module.get_submodule, found[0]["averages"])):
        take_shapes(model, found[0]["shapes"], str(path))
    module.load_state_dict(checkpoint["state_dict"])
    return module.eval()
