"""`checkpoint.pt`: all that a run needs to go on.

A dict of plain numbers, strings, lists and tensors (`torch.load(weights_only=True)` reads it), sealed as
`flatprune.files.sealed` says:

    format "flatprune-checkpoint", version, settings, data_digest,
    progress (epoch, step, order of the samples, sums of the running epoch, seconds, best accuracy), history,
    model, ema, optimizer, scaler, curvature, flatness, sam, disout, pruner (their state dicts, None where there is
    none), rng (states of all generators).

The learning rate is a function of the step, so that there is no scheduler state besides `progress`.
"""

from __future__ import annotations

import os
from typing import Any

from flatprune.files.sealed import load_sealed

CHECKPOINT_FORMAT = "flatprune-checkpoint"
CHECKPOINT_VERSION = 5


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a `checkpoint.pt`, on the CPU.

    Raises:
        InputError: there is no such file, it is not a checkpoint of this package, or of another version.
        DamagedError: it is not what was written.
    """
    return load_sealed(path, CHECKPOINT_FORMAT, CHECKPOINT_VERSION)
