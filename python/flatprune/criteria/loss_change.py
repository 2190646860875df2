"""How much the loss really changes when neurons go, measured without labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfac_ext.curvature import Curvature
from kfac_ext.curvature.loss import Loss
from kfac_ext.curvature.probing import fresh_predictions
from kfac_ext.curvature.recent import Call

_SAMPLES = 64


class LossChange:
    """Takes down what the network predicts before a cut, and says after it how far the predictions have moved.

    The expected change of the mean loss if labels were drawn from the network's own prediction before the cut. That is
    what the Fisher information predicts to second order, so it can be held against the sum of the scores:

        cross entropy: mean KL(p_before || p_after)        mse: mean (f_after - f_before)^2

    over the newest calls of training (64 samples or a batch more, and all positions of an output [N, C, ...]), each
    made again as it was, with batch norms on batch statistics and dropout off, before and after alike. Two forwards a
    call without gradients; random streams, running statistics and factors stay as they are.

    Args:
        curvature: of the network, with at least one training forward behind it.
        before: what the network predicts now for the newest of `Curvature.recent_calls`, where a
            `kfac_ext.curvature.probing.fresh_look` has shown it already.
    """

    def __init__(self, curvature: Curvature, before: Sequence[Tensor] | None = None) -> None:
        self._curvature, self._calls = curvature, _newest(curvature.recent_calls, curvature.ranks)
        if before is None or len(before) < len(self._calls):
            before = fresh_predictions(curvature, self._calls)
        self._before = before[len(before) - len(self._calls) :]

    def measure(self) -> float:
        """The change since this object was made, the mean over ranks."""
        curvature = self._curvature
        change = divergence(self._before, fresh_predictions(curvature, self._calls), curvature.loss)
        if curvature.group is None:
            return change
        return float(curvature.group.mean([torch.tensor([change], dtype=torch.float64)], "measured change")[0])


def _newest(calls: Sequence[Call], ranks: int) -> list[Call]:
    """As many of the newest as it takes for all ranks together to see enough samples."""
    found: list[Call] = []
    samples = 0
    for call in reversed(calls):
        if samples >= _SAMPLES:
            break
        found.append(call)
        samples += call.samples * ranks
    return found[::-1]


def divergence(before: Sequence[Tensor], after: Sequence[Tensor], loss: Loss) -> float:
    """How much the mean loss is expected to rise, over the terms of all predictions together."""
    terms = [loss.terms(prediction) for prediction in before]
    rises = [loss.divergence(p.double(), q.double()) for p, q in zip(before, after)]
    return sum(float(rise) * (n / sum(terms)) for rise, n in zip(rises, terms))
