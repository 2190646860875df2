"""Hugging Face: a `Trainer` that prunes while it trains, checkpoints of pruned networks, `from_pretrained` of them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from flatprune.errors import InputError
from flatprune.files.sealed import load_sealed, save_sealed
from flatprune.integrations.examples import first_samples
from flatprune.integrations.shapes import FORMAT, VERSION, shapes_of, take_shapes
from flatprune.integrations.state_file import STATE_FILE, load_state, save_state
from flatprune.prune_while_training import PruneWhileTraining
from flatprune.pruning.targets import Target

SHAPES_FILE = "pruned_shapes.pt"  # beside the weights: what a network of the full size has to become to take them


class PruningTrainer(Trainer):
    """`transformers.Trainer` with neurons, heads and residual streams going while it trains.

    Everything else is the Trainer's: precision, accumulation, schedulers, logging (events and epochs too), evaluation,
    processes that torchrun starts. Checkpoints resume a pruned network, and `load_pruned` makes one again from a saved
    folder. Only networks that have lost all they will lose can be the best (`load_best_model_at_end`, early stopping).

    Args:
        target: a `flatprune.Target`, or the fraction of the parameters that shall be left.
        pruning: more arguments of `flatprune.PruneWhileTraining`, such as {"flatness": False, "criterion": "taylor"}.
        arguments, keywords: of `transformers.Trainer`.

    Raises:
        InputError: DeepSpeed or FSDP, which shard what has to be cut; `torch_compile`; several devices of one process;
            a model with adapters of PEFT.

    Example:
        >>> trainer = PruningTrainer(model, args, train_dataset=data, target=0.4)
        >>> trainer.train()
        >>> print(trainer.pruning.summary())
    """

    def __init__(
        self, *arguments: Any, target: Target | float, pruning: Mapping[str, Any] | None = None, **keywords: Any
    ) -> None:
        super().__init__(*arguments, **keywords)
        _refuse(self)
        self._pruning: PruneWhileTraining | None = None
        self._target, self._arguments = target, dict(pruning or {})
        self._resumed_from: Path | None = None
        self.add_callback(_Events(self))

    @property
    def pruning(self) -> PruneWhileTraining:
        """The `PruneWhileTraining`; raises InputError before training has begun."""
        if self._pruning is None:
            raise InputError("PruningTrainer: nothing is pruned before training has begun")
        return self._pruning

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The Trainer's loss; in training plus the flatness term."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        pruning = self._pruning or self._begin(inputs)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # of the whole batch's items: a part of the mean that the Trainer divides no further
        whole = num_items_in_batch is not None and (self.model_accepts_loss_kwargs or self.compute_loss_func)
        parts = self.args.gradient_accumulation_steps if whole else 1
        loss = loss + pruning.penalty(inputs, outputs, loss * parts) / parts
        return (loss, outputs) if return_outputs else loss

    @property
    def _network(self) -> nn.Module:
        assert self.model is not None
        return self.model

    def _begin(self, inputs: Mapping[str, Any]) -> PruneWhileTraining:
        wrapped = self.model_wrapped
        self._pruning = PruneWhileTraining(
            wrapped if isinstance(wrapped, DistributedDataParallel) else self._network,
            getattr(self.optimizer, "optimizer", self.optimizer),
            first_samples(dict(inputs)),
            target=self._target,
            total_steps=self.state.max_steps,
            accumulate=self.args.gradient_accumulation_steps,
            **{"logger": _TrainerLog(self), **self._arguments},
        )
        if self._resumed_from is not None:
            self._pruning.load_state_dict(load_state(self._resumed_from, "PruningTrainer")["pruning"])
        return self._pruning

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        with _own_names(self._network):
            super()._save(output_dir, state_dict)
        if self._pruning is not None and self.args.should_save:
            folder = Path(output_dir or self.args.output_dir or ".")
            save_sealed(folder / SHAPES_FILE, shapes_of(self._network))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        if not (folder / STATE_FILE).exists():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        self._resumed_from = folder
        _take_saved(self._network if model is None else model, folder)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether a network is the best so far; none is that may still lose neurons."""
        finished = self._pruning is not None and self._pruning.finished
        return finished and bool(super()._determine_best_metric(metrics, trial))

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        _take_saved(self._network, Path(self.state.best_model_checkpoint))


class _TrainerLog:
    def __init__(self, trainer: PruningTrainer) -> None:
        self._trainer = trainer

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """At the step that the Trainer is at, which is the pruner's."""
        self._trainer.log(dict(scalars))


class _Events(TrainerCallback):
    def __init__(self, trainer: PruningTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_given: Any) -> None:
        self._trainer.pruning.step()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_given: Any
    ) -> None:
        if self._trainer._pruning is not None:
            self._trainer.log(self._trainer._pruning.scalars())

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_given: Any) -> None:
        if self._trainer._pruning is not None and args.should_save:
            folder = Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            save_state(folder, self._trainer._pruning.state_dict())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_given: Any
    ) -> None:
        if self._trainer._pruning is not None:
            self._trainer._pruning.close()


def _refuse(trainer: Trainer) -> None:
    for name, enabled in (("DeepSpeed", trainer.is_deepspeed_enabled), ("FSDP", trainer.is_fsdp_enabled)):
        if enabled:
            raise InputError(f"PruningTrainer: {name} shards parameters, which cannot be cut then; train without it")
    if trainer.args.torch_compile:
        raise InputError("PruningTrainer: torch_compile hides layers from hooks; train without it")
    if trainer.args.n_gpu > 1:
        raise InputError(
            f"PruningTrainer: one process with {trainer.args.n_gpu} devices calls copies of the network; start one for "
            "each by torchrun, or show it one by CUDA_VISIBLE_DEVICES"
        )
    if getattr(trainer.model, "peft_config", None):
        raise InputError(
            "PruningTrainer: checkpoints of a model with PEFT's adapters hold these alone, while all of it is pruned; "
            "merge_and_unload() first, or prune in a loop of your own and flatprune.save"
        )


@contextmanager
def _own_names(model: nn.Module) -> Iterator[None]:
    """Inside, `save_pretrained` calls tensors what the model calls them, and not what files of older versions do.

    A Trainer that goes on, or takes the best network, reads them by the model's names and leaves out all others.
    """
    save = getattr(model, "save_pretrained", None)
    if save is None or "save_original_format" not in inspect.signature(save).parameters:
        yield
        return
    model.save_pretrained = partial(save, save_original_format=False)  # type: ignore[assignment]
    try:
        yield
    finally:
        del model.save_pretrained


def _take_saved(model: nn.Module, folder: Path) -> None:
    """Make a network of the full size the one of a saved folder.

    Raises:
        InputError: a file is missing, or of another network.
    """
    path = folder / SHAPES_FILE
    if not path.is_file():
        raise InputError(f"{path}: no such file; was the network saved by PruningTrainer?")
    tensors = _tensors(folder)
    take_shapes(model, load_sealed(path, FORMAT, VERSION), str(path))
    own = model.state_dict(keep_vars=True)
    tied = {id(own[name]) for name in own.keys() & tensors}
    differing = tensors.keys() - own | {name for name, tensor in own.items() if id(tensor) not in tied}
    if differing:
        raise InputError(f"{folder}: tensors {sorted(differing)[:6]} are only in the network or only in its file")
    model.load_state_dict(tensors, strict=False)


def _tensors(folder: Path) -> dict[str, Tensor]:
    """The weights in a folder, of all files that they are in."""
    if not (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        files = [SAFE_WEIGHTS_NAME]
    else:
        files = sorted(set(json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text())["weight_map"].values()))
    for file in files:
        if not (folder / file).is_file():
            raise InputError(f"{folder / file}: no such file")
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


def load_pruned(kind: type[PreTrainedModel], folder: str | Path) -> PreTrainedModel:
    """The pruned network of a folder that `PruningTrainer.save_model` (or a checkpoint) wrote, in evaluation mode.

    Args:
        kind: the model's class, such as `BertForSequenceClassification`.
        folder: with config.json, the weights and pruned_shapes.pt.

    Raises:
        InputError: a file is missing, or of another network.

    Example:
        >>> model = load_pruned(BertForSequenceClassification, "out/checkpoint-500")
    """
    folder = Path(folder)
    assert kind.config_class is not None
    model = kind(kind.config_class.from_pretrained(folder))
    _take_saved(model, folder)
    return model.eval()
