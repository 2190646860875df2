"""How much the loss really changes when neurons go, measured without labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kfac_ext.curvature import Curvature
from kfac_ext.curvature.probing import fresh_output

_SAMPLES = 256


class LossChange:
    """Takes down what the network predicts before a cut, and says after it how far the predictions have moved.

    The expected change of the mean loss if labels were drawn from the network's own prediction before the cut. That is
    what the Fisher information predicts to second order, so it can be held against the sum of the scores:

        cross entropy: mean KL(p_before || p_after)        mse: mean (f_after - f_before)^2

    over the last 256 inputs of training (and all positions of an output [N, C, ...]), with batch norms on batch
    statistics and dropout off, before and after alike. Two forwards without gradients; random streams, running
    statistics and factors stay as they are.

    Args:
        curvature: of the network, with at least one training forward behind it.
    """

    def __init__(self, curvature: Curvature) -> None:
        self._curvature = curvature
        self._inputs = _last_samples(curvature.recent_inputs)
        self._before = fresh_output(curvature, self._inputs)

    def measure(self) -> float:
        """The change since this object was made."""
        return divergence(self._before, fresh_output(self._curvature, self._inputs), self._curvature.loss)


def divergence(before: Tensor, after: Tensor, loss: str) -> float:
    """mean KL(softmax before || softmax after) over all but dimension 1, or the mean squared difference for "mse"."""
    before, after = before.double(), after.double()
    if loss == "mse":
        return float((after - before).square().mean())
    log_p = before.log_softmax(dim=1)
    return float((log_p.exp() * (log_p - after.log_softmax(dim=1))).sum(dim=1).mean())


def _last_samples(batches: Sequence[Any]) -> list[tuple[Tensor, ...]]:
    """The newest 256 samples of batches, oldest first."""
    kept: list[tuple[Tensor, ...]] = []
    missing = _SAMPLES
    for batch in reversed(batches):
        if missing <= 0:
            break
        parts = batch if isinstance(batch, tuple) else (batch,)
        kept.append(tuple(part[-missing:] for part in parts))
        missing -= len(parts[0])
    return kept[::-1]
