"""Kernels that let neurons go, called on problems that are already checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kfac_ext import _C
from kfac_ext.ops._library import DTYPE_CODES


class Layer(NamedTuple):
    """The state of a layer, as `kfac::GreedyProblem` has it, and the columns that go."""

    weight: Tensor
    inverse: Tensor
    G: Tensor
    removed: Tensor
    removed_count: int
    pending: Tensor
    pending_count: int
    lost: Tensor


class Neurons(NamedTuple):
    """Neurons that feed equally many columns of a layer: `kfac::GreedyNeurons`."""

    columns: Tensor
    layer: int
    blocks: Tensor
    forms: Tensor
    scores: Tensor


def run_cpu(layers: Sequence[Layer], lists: Sequence[Neurons]) -> tuple[list[float], list[list[int]]]:
    """The changes, and for each layer what failed: a place in `lost`; a list and a neuron in it; -1 for nothing."""
    problems: list[tuple[list[int], list[list[int]]]] = [(_layer(layer), []) for layer in layers]
    numbers: list[list[int]] = [[] for _ in layers]
    for number, neurons in enumerate(lists):
        problems[neurons.layer][1].append(_neurons(neurons))
        numbers[neurons.layer].append(number)
    found = _C.greedy_remove_cpu(problems, DTYPE_CODES[layers[0].weight.dtype], torch.get_num_threads())
    changes = [change for _, change, *_ in found]
    failures = [
        [column, numbers[i][number] if number >= 0 else -1, neuron]
        for i, (_, _, column, number, neuron) in enumerate(found)
    ]
    return changes, failures


def _layer(layer: Layer) -> list[int]:
    V, H, G = layer.weight, layer.inverse, layer.G
    return [
        *(V.data_ptr(), *V.shape, V.stride(0), H.data_ptr(), H.stride(0), G.data_ptr(), G.stride(0)),
        *(layer.removed.data_ptr(), layer.removed_count),
        *(layer.pending.data_ptr(), layer.pending_count, len(layer.pending)),
        *(layer.lost.data_ptr(), len(layer.lost)),
    ]


def _neurons(neurons: Neurons) -> list[int]:
    states = (neurons.blocks.data_ptr(), neurons.forms.data_ptr(), neurons.scores.data_ptr())
    return [neurons.columns.data_ptr(), *neurons.columns.shape, *states]
