"""Kernels that let neurons go, called on problems that are already checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kfac_ext import _C, reference
from kfac_ext.ops._cuda import register_family, worst
from kfac_ext.ops._launch import stream_of, workspace_on
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


Problems = list[tuple[list[int], list[list[int]]]]


def run_cpu(layers: Sequence[Layer], lists: Sequence[Neurons]) -> tuple[Tensor, Tensor]:
    """Changes float64 [layers], and failures int64 [layers, 3], as `kfac_ext.reference.greedy_remove_` has them."""
    found = _C.greedy_remove_cpu(_problems(layers, lists), DTYPE_CODES[layers[0].weight.dtype], torch.get_num_threads())
    failures = [
        [column, own[place] if place >= 0 else -1, neuron]
        for own, (_, _, column, place, neuron) in zip(_numbers(layers, lists), found)
    ]
    changes = torch.tensor([change for _, change, *_ in found], dtype=torch.float64)
    return changes, torch.tensor(failures, dtype=torch.int64)


def _numbers(layers: Sequence[Layer], lists: Sequence[Neurons]) -> list[list[int]]:
    """Which lists are of each layer."""
    return [[n for n, neurons in enumerate(lists) if neurons.layer == i] for i in range(len(layers))]


def _problems(layers: Sequence[Layer], lists: Sequence[Neurons]) -> Problems:
    numbers = _numbers(layers, lists)
    return [(_layer(layer), [_neurons(lists[n]) for n in own]) for layer, own in zip(layers, numbers)]


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


# ---- CUDA ----


def fits_cuda(layers: Sequence[Layer], lists: Sequence[Neurons]) -> bool:
    """Whether the CUDA kernels can let so many columns go at once, and score blocks of this size."""
    most = max(len(layer.lost) for layer in layers), max(neurons.columns.shape[1] for neurons in lists)
    return max(most) <= _C.max_greedy_block


def launch_cuda(layers: Sequence[Layer], lists: Sequence[Neurons]) -> tuple[Tensor, Tensor]:
    """As `run_cpu`, without waiting; of the failures only the first of each layer is written.

    Scores are minus infinity where a block is not positive definite.
    """
    device = layers[0].weight.device
    changes = torch.zeros(len(layers), dtype=torch.float64, device=device)
    failures = torch.full((len(layers), 3), -1, dtype=torch.int64, device=device)
    problems = _problems(layers, lists)
    workspace = workspace_on(device, 4 * _C.greedy_floats(problems))
    places = workspace.data_ptr(), changes.data_ptr(), failures.data_ptr()
    _C.greedy_remove_cuda(problems, *places, device.index or 0, stream_of(device))
    return changes, failures


def run_cuda(layers: Sequence[Layer], lists: Sequence[Neurons]) -> tuple[Tensor, Tensor]:
    """As `run_cpu`; it waits for the device, to know what failed."""
    changes, failures = launch_cuda(layers, lists)
    bad = [neurons.scores == -torch.inf for neurons in lists]
    for number in torch.stack([some.any() for some in bad]).nonzero().flatten().tolist()[::-1]:
        failures[lists[number].layer, 1:] = torch.stack([torch.tensor(number), bad[number].nonzero()[0, 0].cpu()])
    return changes, failures


def _check(device: torch.device) -> float:
    """Worst relative error of scores and changes over some steps as a multiple of what is allowed, on two layers."""
    errors = []
    for outputs, neurons, block in ((40, 9, 9), (70, 67, 1)):
        columns = torch.arange(neurons * block, device=device).view(neurons, block)
        exact, single = (_small_layer(outputs, columns, dtype) for dtype in (torch.float64, torch.float32))
        gone = 0
        for step in (0, 1, 3):
            lost = columns[gone : gone + step].flatten()
            layers = [layer._replace(removed_count=gone * block, lost=lost) for layer, _ in (exact, single)]
            layers = [layer._replace(pending_count=gone * block) for layer in layers]
            wanted, found = _reference_step(layers[0], exact[1])[0], launch_cuda([layers[1]], [single[1]])[0]
            gone += step
            errors.append(((single[1].scores - exact[1].scores) / exact[1].scores)[gone:].abs().max())
            if step:
                errors.append(((found - wanted) / wanted).abs().max())
    return worst(errors, 1e-4)


def _small_layer(outputs: int, columns: Tensor, dtype: torch.dtype) -> tuple[Layer, Neurons]:
    """A layer and its neurons before any went, without random numbers."""
    d, device = columns.numel(), columns.device
    x = torch.sin(torch.arange(200 * d, dtype=torch.float64, device=device).square() / 7).view(200, -1)
    eye = torch.eye(max(d, outputs), dtype=torch.float64, device=device)
    V, H, g = x[:outputs] + 0.1, x.mT @ x + eye[:d, :d], x[:, : min(outputs, d)]
    G = eye[:outputs, :outputs].clone()
    G[: g.shape[1], : g.shape[1]] += g.mT @ g
    blocks = H[columns[:, :, None], columns[:, None, :]]
    read = V[:, columns].transpose(0, 1)
    V, H, G = V.to(dtype), H.to(dtype), G.to(dtype)
    layer = Layer(V, H, G, columns.new_empty(d), 0, V.new_empty(min(64, d), outputs), 0, columns.new_empty(0))
    return layer, Neurons(columns, 0, blocks, read.mT @ (G.double() @ read), blocks.new_zeros(len(columns)))


def _reference_step(layer: Layer, neurons: Neurons) -> tuple[Tensor, Tensor]:
    return reference.greedy_remove_(
        [layer.weight],
        [layer.inverse],
        [layer.G],
        [layer.removed],
        [layer.pending],
        [layer.removed_count, layer.pending_count],
        [layer.lost],
        [neurons.columns],
        [0],
        [neurons.blocks],
        [neurons.forms],
        [neurons.scores],
    )


register_family("greedy_selection", frozenset({torch.float32}), _check)
