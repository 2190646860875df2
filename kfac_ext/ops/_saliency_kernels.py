"""Kernels that score neurons, called on problems that are already checked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfac_ext import _C, reference
from kfac_ext.ops._cuda import register_family, worst
from kfac_ext.ops._launch import descriptors_on, stream_of
from kfac_ext.ops._library import DTYPE_CODES
from kfac_ext.ops._lists import row_major
from kfac_ext.ops._schedules import Schedules

Layer = tuple[Tensor, Tensor, Tensor, int]
"""V, A or H, G, columns a neuron feeds"""


def _problems(layers: Sequence[Layer]) -> tuple[list[Layer], list[Tensor]]:
    rows = [(row_major(V), row_major(A), row_major(G), block) for V, A, G, block in layers]
    return rows, [V.new_empty(V.shape[1] // block) for V, *_, block in rows]


def run_cpu(layers: Sequence[Layer], obs: bool) -> tuple[list[Tensor], list[int]]:
    """Scores on the CPU, and for each layer the first neuron whose H_JJ is not positive definite, or -1."""
    rows, scores = _problems(layers)
    problems = [
        (V.data_ptr(), *V.shape, V.stride(0), A.data_ptr(), A.stride(0), G.data_ptr(), G.stride(0), block, s.data_ptr())
        for (V, A, G, block), s in zip(rows, scores)
    ]
    return scores, _C.saliency_cpu(problems, obs, DTYPE_CODES[rows[0][0].dtype], torch.get_num_threads())


# ---- CUDA ----

_Shape = tuple[int, int, int, int, int, int]


def _make_group(device: torch.device, shapes: tuple[_Shape, ...]) -> tuple[_C.SaliencyGroup, Tensor]:
    """The schedule for layers of these shapes and row strides, and its copy on the device."""
    group = _C.SaliencyGroup(shapes)
    return group, descriptors_on(device, "saliency", group.descriptors())


_group = Schedules(_make_group, lambda found: [found[1]])


def _shape(layer: Layer) -> _Shape:
    V, A, G, block = layer
    return (V.shape[0], V.shape[1], block, V.stride(0), A.stride(0), G.stride(0))


def fits_cuda(layer: Layer) -> bool:
    """Whether the CUDA kernel can score a layer with blocks of this size."""
    return layer[3] <= _C.max_saliency_block


def launch_cuda(layers: Sequence[Layer], obs: bool) -> tuple[list[Tensor], Tensor]:
    """Scores of layers of one device, 120 at a time, on its current stream, without waiting; and an int32 a neuron.

    The latter is 1 where H_JJ is not positive definite, and nothing without `obs`.
    """
    rows, scores = _problems(layers)
    device = rows[0][0].device
    flags = torch.empty(sum(map(len, scores)) if obs else 0, dtype=torch.int32, device=device)
    neurons = 0
    for first in range(0, len(rows), _C.max_saliency_layers):
        part = slice(first, first + _C.max_saliency_layers)
        group, descriptors = _group(device, tuple(_shape(layer) for layer in rows[part]))
        _C.saliency_cuda(
            group,
            descriptors.data_ptr(),
            [
                (V.data_ptr(), A.data_ptr(), G.data_ptr(), s.data_ptr())
                for (V, A, G, _), s in list(zip(rows, scores))[part]
            ],
            obs,
            flags[neurons:].data_ptr() if obs else 0,
            device.index or 0,
            stream_of(device),
        )
        neurons += sum(map(len, scores[part]))
    return scores, flags


def run_cuda(layers: Sequence[Layer], obs: bool) -> tuple[list[Tensor], list[int]]:
    """As `run_cpu`. With `obs` it waits for the device, to know what failed."""
    scores, flags = launch_cuda(layers, obs)
    failed = [-1] * len(layers)
    if obs and bool(flags.any()):
        for i, bad in enumerate(flags.split([len(score) for score in scores])):
            if bool(bad.any()):
                failed[i] = int(bad.nonzero()[0])
    return scores, failed


def _shifted(matrix: Tensor) -> Tensor:
    return matrix + torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def _check(device: torch.device) -> float:
    """Worst relative error of scores as a multiple of what is allowed, on a convolution and a linear layer."""
    layers: list[Layer] = []
    for outputs, neurons, block in ((70, 9, 9), (5, 67, 1)):
        steps = torch.arange(200 * neurons * block, dtype=torch.float64, device=device)
        x = torch.sin(steps.square() / 7).view(200, -1)
        g = x[:, :outputs] if outputs <= x.shape[1] else x.mT
        layers.append((x[:outputs] + 0.1, _shifted(x.mT @ x), _shifted(g.mT @ g), block))
    errors = []
    for obs in (False, True):
        exact = getattr(reference, "obs_saliency" if obs else "obd_saliency")(*map(list, zip(*layers)))
        scores, _ = launch_cuda([(V.float(), A.float(), G.float(), block) for V, A, G, block in layers], obs)
        errors += [((score - wanted) / wanted).abs().max() for score, wanted in zip(scores, exact)]
    return worst(errors, 1e-5)


register_family("saliency", frozenset({torch.float32}), _check)
