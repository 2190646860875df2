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

if TYPE_CHECKING:
    from flatprune.averaging import AveragedWeights
    from flatprune.data import Normalization
    from flatprune.distortion import Disout, disout
    from flatprune.errors import DivergedError, InputError, Interrupted
    from flatprune.export import load
    from flatprune.hessian import hessian_eigenvalues
    from flatprune.pruner import Pruner
    from flatprune.runs import resume, run
    from flatprune.sam import SAM, MomentumSAM
    from flatprune.schedule import CubicSchedule
    from flatprune.settings import Settings
    from flatprune.shifting import optimum_shift
    from flatprune.spectrum import Flatness, hessian_lambda_max
    from flatprune.targets import Target
    from kfac_ext import Curvature

_HOMES = {
    "SAM": "flatprune.sam",
    "AveragedWeights": "flatprune.averaging",
    "CubicSchedule": "flatprune.schedule",
    "Curvature": "kfac_ext.curvature",
    "Disout": "flatprune.distortion",
    "DivergedError": "flatprune.errors",
    "Flatness": "flatprune.spectrum",
    "InputError": "flatprune.errors",
    "Interrupted": "flatprune.errors",
    "MomentumSAM": "flatprune.sam",
    "Normalization": "flatprune.data",
    "Pruner": "flatprune.pruner",
    "Settings": "flatprune.settings",
    "Target": "flatprune.targets",
    "disout": "flatprune.distortion",
    "hessian_eigenvalues": "flatprune.hessian",
    "hessian_lambda_max": "flatprune.spectrum",
    "load": "flatprune.export",
    "optimum_shift": "flatprune.shifting",
    "resume": "flatprune.runs",
    "run": "flatprune.runs",
}
__all__ = [
    "SAM",
    "AveragedWeights",
    "CubicSchedule",
    "Curvature",
    "Disout",
    "DivergedError",
    "Flatness",
    "InputError",
    "Interrupted",
    "MomentumSAM",
    "Normalization",
    "Pruner",
    "Settings",
    "Target",
    "disout",
    "hessian_eigenvalues",
    "hessian_lambda_max",
    "load",
    "optimum_shift",
    "resume",
    "run",
]


def __getattr__(name: str) -> Any:
    # Importing torch takes a second and torch-pruning more: each name is fetched when it is first used.
    if name not in _HOMES:
        raise AttributeError(f"module 'flatprune' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
