"""How much the loss really changes when neurons go, measured without labels."""

from __future__ import annotations

from torch import Tensor

from kfac_ext.curvature import Curvature
from kfac_ext.curvature.probing import fresh_output


class LossChange:
    """Takes down what the network predicts before a cut, and says after it how far the predictions have moved.

    The expected change of the mean loss if labels were drawn from the network's own prediction before the cut. That is
    what the Fisher information predicts to second order, so it can be held against the sum of the scores:

        cross entropy: mean KL(p_before || p_after)        mse: mean (f_after - f_before)^2

    over the recent inputs of training, 256 samples or a little more (and all positions of an output [N, C, ...]), with
    batch norms on batch statistics and dropout off, before and after alike. Two forwards without gradients; random
    streams, running statistics and factors stay as they are.

    Args:
        curvature: of the network, with at least one training forward behind it.
        before: what the network predicts now, where a `kfac_ext.curvature.probing.fresh_look` at the same inputs has
            shown it already.
    """

    def __init__(self, curvature: Curvature, before: Tensor | None = None) -> None:
        self._curvature, self._inputs = curvature, curvature.recent_inputs
        self._before = fresh_output(curvature, self._inputs) if before is None else before

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
