"""Cutting a network that FSDP2 has sharded: gathered, cut by the pruner as it is, sharded anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flatprune.cutting.optimizers import as_optimizers
from flatprune.export import take_tensors
from flatprune.flatness.spectrum import Flatness
from flatprune.pruning.pruner import Pruner
from flatprune.pruning.removals import Removal
from kfac_ext.curvature import Curvature


class ShardedTraining(NamedTuple):
    """What a loop goes on with; after an event all of it is new.

    Attributes:
        model: sharded.
        optimizer: of its shards.
        curvature: of the model.
        pruner: whose `step` is not to be called: `prune_sharded` does.
        flatness: the term, or None.
        removals: of the step that gave this.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    curvature: Curvature
    pruner: Pruner
    flatness: Flatness | None = None
    removals: tuple[Removal, ...] = ()


class Recipe(NamedTuple):
    """How a script makes what it trains.

    Attributes:
        build: the network, plain and unsharded; its weights do not matter.
        shard: `fully_shard`s a network in place, layer by layer, and returns it.
        make_optimizer: of a network, sharded or not.
        make_curvature: of a plain network, with `process_group` that of the ranks.
        make_pruner: of (plain network, optimizer or None, curvature).
        make_flatness: of the curvature, in mode "forward"; or None.
    """

    build: Callable[[], nn.Module]
    shard: Callable[[nn.Module], nn.Module]
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    make_curvature: Callable[[nn.Module], Curvature]
    make_pruner: Callable[[nn.Module, torch.optim.Optimizer | None, Curvature], Pruner]
    make_flatness: Callable[[Curvature], Flatness] | None = None

    def begin(self) -> ShardedTraining:
        """Everything at the beginning, curvature and pruner made before the network is sharded.

        Raises:
            ValueError: the flatness term is in mode "double_backward", whose second derivatives reach for weights that
                FSDP2 has freed; the curvature does not know the ranks.
        """
        model = self.build()
        curvature = self._curvature(model)
        pruner = self.make_pruner(model, None, curvature)
        flatness = self._flatness(curvature)
        model = self.shard(model)
        return ShardedTraining(model, self.make_optimizer(model), curvature, pruner, flatness)

    def _curvature(self, model: nn.Module) -> Curvature:
        curvature = self.make_curvature(model)
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if curvature.group is None and ranks > 1:
            raise ValueError(
                "prune_sharded: the curvature knows of no ranks: make it with Curvature(model, process_group=...)"
            )
        return curvature

    def _flatness(self, curvature: Curvature) -> Flatness | None:
        flatness = None if self.make_flatness is None else self.make_flatness(curvature)
        if flatness is not None and flatness.mode == "double_backward":
            raise ValueError(
                "prune_sharded: mode 'double_backward' differentiates through weights that FSDP2 has freed; "
                "take 'forward'"
            )
        return flatness


def prune_sharded(recipe: Recipe, training: ShardedTraining) -> ShardedTraining:
    """One step of the pruner of a sharded network, on all ranks, after `optimizer.step()`.

    Between events it counts the step and returns what it was given. At an event the network and its optimizer are
    gathered into plain ones, which `Pruner.step` cuts as it cuts any, and sharded anew. For that moment every rank
    holds all of both. Gradients are gone afterwards.

    Args:
        recipe: how all parts are made.
        training: what the loop goes on with.

    Returns:
        What the loop goes on with now.

    Raises:
        RanksError, ValueError: as `Pruner.step`.

    Example:
        >>> training = recipe.begin()
        >>> for x, y in loader:
        ...     training.optimizer.zero_grad()
        ...     criterion(training.model(x), y).backward()
        ...     training.optimizer.step()
        ...     training = prune_sharded(recipe, training)
    """
    pruner = training.pruner
    if not pruner.is_event():
        pruner.step_count += 1
        return training._replace(removals=())
    state = _gathered(training)
    training.curvature.remove()
    model = recipe.build().to(next(iter(state.tensors.values())).device)
    take_tensors(model, state.tensors)
    optimizer = recipe.make_optimizer(model)
    _set_states(model, optimizer, state.moments, sharded=False)
    curvature = recipe._curvature(model)
    curvature.load_state_dict(state.curvature)
    pruner = recipe.make_pruner(model, optimizer, curvature)
    pruner.load_state_dict(state.pruner)
    flatness = recipe._flatness(curvature)
    if flatness is not None and state.flatness is not None:
        flatness.load_state_dict(state.flatness)
    removals = tuple(pruner.step())
    moments = _states(model, optimizer)
    pruner.forget_optimizers()
    model = recipe.shard(model)
    optimizer = recipe.make_optimizer(model)
    _set_states(model, optimizer, moments, sharded=True)
    return ShardedTraining(model, optimizer, curvature, pruner, flatness, removals)


class _Gathered(NamedTuple):
    tensors: dict[str, Tensor]
    moments: dict[str, Any]
    curvature: dict[str, Any]
    pruner: dict[str, Any]
    flatness: dict[str, Any] | None


def _gathered(training: ShardedTraining) -> _Gathered:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    tensors = get_model_state_dict(training.model, options=StateDictOptions(full_state_dict=True))
    return _Gathered(
        {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)},
        _states(training.model, training.optimizer),
        training.curvature.state_dict(),
        training.pruner.state_dict(),
        None if training.flatness is None else training.flatness.state_dict(),
    )


def _states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    return get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))


def _set_states(model: nn.Module, optimizer: torch.optim.Optimizer, moments: dict[str, Any], *, sharded: bool) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    as_optimizers(optimizer, "prune_sharded: make_optimizer")
    options = StateDictOptions(full_state_dict=True) if sharded else None
    set_optimizer_state_dict(model, optimizer, moments, options=options)
