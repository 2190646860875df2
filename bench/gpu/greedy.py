"""Greedy selection on a GPU: some neurons of every layer of a network go, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import kfac_ext
from bench.check import worst_error
from bench.gpu.counts import greedy_floor
from bench.gpu.linear_algebra import LARGEST_CHECKED, score_operands
from bench.timing import Variant
from bench.worksets import LayerShape

REMOVALS = 8


class Selections:
    """`GreedySelection` over all layers: copies of V and H, first scores, and eight neurons a layer that go."""

    def __init__(self, layers: Sequence[LayerShape], device: torch.device) -> None:
        self.weights, self.inverses, self.Gs = score_operands(layers, device)
        self.columns = [torch.arange(i.patch, device=device).view(-1, i.kernel**2) for i in layers]
        self.removals = min(REMOVALS, *(len(columns) - 1 for columns in self.columns))
        # the plain way updates all of H and V each time, and scores by a product with G
        self.flops = float(sum(self.removals * 2 * i.patch * (i.outputs**2 + i.kernel**2 * i.patch) for i in layers))
        self.bytes = float(sum(8 * i.patch * (i.patch + i.outputs) for i in layers))
        self.floor = greedy_floor(layers, self.removals)

    def variants(self) -> dict[str, Variant]:
        """Native, and the same steps in plain PyTorch."""
        return {"native": self._select, "plain steps": self._plain}

    def _plain(self) -> list[Tensor]:
        with kfac_ext.use_native(False):
            return self._select()

    def _select(self) -> list[Tensor]:
        return self._of(self.weights, self.inverses, self.Gs, self.columns)

    def _of(self, *state: Sequence[Tensor]) -> list[Tensor]:
        selection = kfac_ext.GreedySelection(*state)
        for neuron in range(self.removals):
            selection.remove_({number: [neuron] for number in range(len(state[0]))})
        return [scores[self.removals :] for scores in selection.scores]

    def error(self) -> float:
        """Worst relative error of native's last scores against float64."""
        few = [i for i, H in enumerate(self.inverses) if len(H) <= LARGEST_CHECKED]
        weights, inverses, Gs = ([values[i] for i in few] for values in (self.weights, self.inverses, self.Gs))
        columns = [self.columns[i] for i in few]
        exact_inverses, exact_Gs = ([_symmetric(m.double()) for m in values] for values in (inverses, Gs))
        with kfac_ext.use_native(False):
            exact = self._of([V.double() for V in weights], exact_inverses, exact_Gs, columns)
        return worst_error(self._of(weights, inverses, Gs, columns), exact)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2
