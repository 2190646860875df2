"""Hugging Face: a `Trainer` that prunes while it trains, checkpoints of pruned networks, `from_pretrained` of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from flatprune.errors import InputError
from flatprune.files.sealed import load_sealed, save_sealed
from flatprune.integrations.shapes import FORMAT, VERSION, shapes_of, take_shapes
from flatprune.integrations.state_file import STATE_FILE, load_state, save_state
from flatprune.prune_while_training import PruneWhileTraining
from flatprune.pruning.targets import Target

SHAPES_FILE = "pruned_shapes.pt"  # beside the weights: what a network of the full size has to become to take them
_EXAMPLES = 2


class PruningTrainer(Trainer):
    """`transformers.Trainer` with neurons, heads and residual streams going while it trains.

    Everything else is the Trainer's: precision, accumulation, schedulers, logging (events and epochs too), evaluation.
    Checkpoints resume a pruned network, and `load_pruned` makes one again from a saved folder.

    Args:
        target: a `flatprune.Target`, or the fraction of the parameters that shall be left.
        pruning: more arguments of `flatprune.PruneWhileTraining`, such as {"flatness": False, "criterion": "taylor"}.
        arguments, keywords: of `transformers.Trainer`.

    Raises:
        InputError: DeepSpeed or FSDP, which shard what has to be cut.

    Example:
        >>> trainer = PruningTrainer(model, args, train_dataset=data, target=0.4)
        >>> trainer.train()
        >>> print(trainer.pruning.summary())
    """

    def __init__(
        self, *arguments: Any, target: Target | float, pruning: Mapping[str, Any] | None = None, **keywords: Any
    ) -> None:
        super().__init__(*arguments, **keywords)
        for name, enabled in (("DeepSpeed", self.is_deepspeed_enabled), ("FSDP", self.is_fsdp_enabled)):
            if enabled:
                raise InputError(
                    f"PruningTrainer: {name} shards parameters, which cannot be cut then; train without it"
                )
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
        examples = {name: v[:_EXAMPLES] if isinstance(v, Tensor) and v.dim() else v for name, v in inputs.items()}
        self._pruning = PruneWhileTraining(
            self._network,
            getattr(self.optimizer, "optimizer", self.optimizer),
            examples,
            target=self._target,
            total_steps=self.state.max_steps,
            accumulate=self.args.gradient_accumulation_steps,
            **{"logger": _TrainerLog(self), **self._arguments},
        )
        if self._resumed_from is not None:
            self._pruning.load_state_dict(load_state(self._resumed_from, "PruningTrainer")["pruning"])
        return self._pruning

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self._pruning is not None and self.args.should_save:
            folder = Path(output_dir or self.args.output_dir or ".")
            save_sealed(folder / SHAPES_FILE, shapes_of(self._network))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        if (folder / STATE_FILE).exists():
            self._resumed_from = folder
            _take_saved_shapes(self._network if model is None else model, folder)
        super()._load_from_checkpoint(resume_from_checkpoint, model)


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


def _take_saved_shapes(model: nn.Module, folder: Path) -> None:
    path = folder / SHAPES_FILE
    if not path.is_file():
        raise InputError(f"{path}: no such file; was the network saved by PruningTrainer?")
    take_shapes(model, load_sealed(path, FORMAT, VERSION), str(path))


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
    _take_saved_shapes(model, folder)
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise InputError(f"{weights}: no such file")
    from safetensors.torch import load_file

    found = model.load_state_dict(load_file(weights), strict=False)
    model.tie_weights()
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    if found.unexpected_keys or set(found.missing_keys) - tied:
        raise InputError(
            f"{weights}: tensors {[*found.unexpected_keys, *found.missing_keys]} differ from the network's"
        )
    return model.eval()
