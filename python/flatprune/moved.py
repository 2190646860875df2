"""Models whose parameters are, for a moment, not their own: SAM and momentum-SAM have moved them.

A change of such a model would be lost when the parameters are put back, so whoever changes one asks here first.
"""

from __future__ import annotations

from weakref import WeakSet

from torch import nn

moved_models: WeakSet[nn.Module] = WeakSet()


def refuse_moved(model: nn.Module, caller: str) -> None:
    """Raise RuntimeError where the parameters of `model` are not its own."""
    if model in moved_models:
        raise RuntimeError(f"{caller}: the parameters are moved by SAM or MomentumSAM, expected after that has ended")
