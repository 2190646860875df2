"""Train a network and prune its neurons at the same time, toward flat minima.

The method is that of Ebrahimi & Klabjan 2021 (arXiv 2111.08577) in its idea: neurons go while the network trains, and
the Hessian's spectral radius is held down, both by Kronecker-factored curvature (Martens & Grosse 2015).

    curvature = flatprune.Curvature(model)
    flatness = flatprune.Flatness(curvature, total_steps=steps)
    pruner = flatprune.Pruner(model, optimizer, curvature, example_inputs,
                              target=flatprune.Target(params=0.1), total_steps=steps)
    for x, y in loader:
        optimizer.zero_grad()
        logits = model(x)
        loss = criterion(logits, y)
        (loss + flatness.penalty(x, logits, loss)).backward()
        optimizer.step()
        pruner.step()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flatprune.extras import needed_by

if TYPE_CHECKING:
    from flatprune.coupling import find_coupling
    from flatprune.criteria import CRITERIA, Criterion
    from flatprune.data import Normalization
    from flatprune.errors import DivergedError, InputError, Interrupted
    from flatprune.export import load, save, take_tensors, update_config
    from flatprune.flatness.distortion import Disout, attach_disout
    from flatprune.flatness.hessian import hessian_eigenvalues, loss_along_top_eigenvector
    from flatprune.flatness.sam import SAM, MomentumSAM
    from flatprune.flatness.shifting import optimum_shift
    from flatprune.flatness.spectrum import Flatness, hessian_lambda_max
    from flatprune.inspection import sensitivity, summary
    from flatprune.prune_while_training import PruneWhileTraining
    from flatprune.pruning.learning_rate import PruningLR
    from flatprune.pruning.pruner import Pruner
    from flatprune.pruning.removals import Removal
    from flatprune.pruning.schedule import CubicSchedule
    from flatprune.pruning.sharded import Recipe, ShardedTraining, prune_sharded
    from flatprune.pruning.targets import Target
    from flatprune.runs import resume, run
    from flatprune.settings import Settings
    from flatprune.training.averaging import AveragedWeights
    from kfac_ext import Curvature

_HOMES = {
    "CRITERIA": "flatprune.criteria",
    "SAM": "flatprune.flatness.sam",
    "AveragedWeights": "flatprune.training.averaging",
    "Criterion": "flatprune.criteria",
    "CubicSchedule": "flatprune.pruning.schedule",
    "Curvature": "kfac_ext.curvature",
    "Disout": "flatprune.flatness.distortion",
    "DivergedError": "flatprune.errors",
    "Flatness": "flatprune.flatness.spectrum",
    "InputError": "flatprune.errors",
    "Interrupted": "flatprune.errors",
    "MomentumSAM": "flatprune.flatness.sam",
    "Normalization": "flatprune.data",
    "PruneWhileTraining": "flatprune.prune_while_training",
    "Pruner": "flatprune.pruning.pruner",
    "PruningLR": "flatprune.pruning.learning_rate",
    "Recipe": "flatprune.pruning.sharded",
    "Removal": "flatprune.pruning.removals",
    "Settings": "flatprune.settings",
    "ShardedTraining": "flatprune.pruning.sharded",
    "Target": "flatprune.pruning.targets",
    "attach_disout": "flatprune.flatness.distortion",
    "find_coupling": "flatprune.coupling",
    "hessian_eigenvalues": "flatprune.flatness.hessian",
    "hessian_lambda_max": "flatprune.flatness.spectrum",
    "load": "flatprune.export",
    "loss_along_top_eigenvector": "flatprune.flatness.hessian",
    "optimum_shift": "flatprune.flatness.shifting",
    "prune_sharded": "flatprune.pruning.sharded",
    "resume": "flatprune.runs",
    "run": "flatprune.runs",
    "save": "flatprune.export",
    "sensitivity": "flatprune.inspection",
    "summary": "flatprune.inspection",
    "take_tensors": "flatprune.export",
    "update_config": "flatprune.export",
}
__all__ = [
    "CRITERIA",
    "SAM",
    "AveragedWeights",
    "Criterion",
    "CubicSchedule",
    "Curvature",
    "Disout",
    "DivergedError",
    "Flatness",
    "InputError",
    "Interrupted",
    "MomentumSAM",
    "Normalization",
    "PruneWhileTraining",
    "Pruner",
    "PruningLR",
    "Recipe",
    "Removal",
    "Settings",
    "ShardedTraining",
    "Target",
    "attach_disout",
    "find_coupling",
    "hessian_eigenvalues",
    "hessian_lambda_max",
    "load",
    "loss_along_top_eigenvector",
    "optimum_shift",
    "prune_sharded",
    "resume",
    "run",
    "save",
    "sensitivity",
    "summary",
    "take_tensors",
    "update_config",
]


def __getattr__(name: str) -> Any:
    # Importing torch takes a second: each name is fetched when it is first used.
    if name not in _HOMES:
        raise AttributeError(f"module 'flatprune' has no attribute {name!r}")
    with needed_by(f"flatprune.{name}"):
        value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
