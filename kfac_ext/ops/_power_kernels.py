"""Power iteration kernels, called on problems that are already checked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from kfac_ext import _C, reference
from kfac_ext.ops._cuda import register_family, worst
from kfac_ext.ops._launch import descriptors_on, stream_of, workspace_on
from kfac_ext.ops._library import DTYPE_CODES
from kfac_ext.ops._lists import row_major
from kfac_ext.ops._schedules import Schedules

Results = tuple[Tensor, Tensor, Tensor]
"""eigenvalues, residuals, iterations: each [L]"""


def to_tensors(pairs: Sequence[tuple[float, float, int]], like: Tensor) -> Results:
    """Results that were found on the host."""
    values, residuals, iterations = zip(*pairs)
    return like.new_tensor(values), like.new_tensor(residuals), like.new_tensor(iterations, dtype=torch.int32)


def empty_results(count: int, like: Tensor) -> Results:
    """Where results go."""
    return like.new_empty(count), like.new_empty(count), like.new_empty(count, dtype=torch.int32)


def run_cpu(matrices: Sequence[Tensor], vectors: Tensor, starts: Sequence[int], tol: float, max_iter: int) -> Results:
    """Iterate matrices on the CPU; what `vectors` holds from each start on becomes the eigenvector."""
    copies: list[Tensor] = []
    problems: list[int] = []  # what a tensor is asked takes longer than iterating a small matrix: nothing twice
    first, width = vectors.data_ptr(), vectors.element_size()
    for matrix, start in zip(matrices, starts):
        n, (row, column) = matrix.shape[0], matrix.stride()
        if column != 1 or row < n:
            matrix, row = matrix.contiguous(), n
            copies.append(matrix)
        problems += (matrix.data_ptr(), n, row, first + start * width)
    results = empty_results(len(matrices), vectors)
    places = [result.data_ptr() for result in results]
    _C.power_iteration_cpu(problems, DTYPE_CODES[vectors.dtype], tol, max_iter, torch.get_num_threads(), places)
    return results


# ---- CUDA ----


@lru_cache(maxsize=16)
def _device(device: torch.device) -> tuple[int, int]:
    """How many blocks the device holds at once, and the shared memory of each."""
    return _C.power_iteration_device(device.index or 0)


def _make_group(device: torch.device, shapes: tuple[tuple[int, int], ...]) -> tuple[_C.PowerGroup, Tensor]:
    """The schedule for matrices of these sizes and row strides, and its copy on the device."""
    group = _C.PowerGroup(shapes, *_device(device))
    return group, descriptors_on(device, "power_iteration", group.descriptors())


_group = Schedules(_make_group, lambda found: [found[1]])


def fits_cuda(matrices: Sequence[Tensor]) -> bool:
    """Whether the shared memory of the matrices' device has room for the largest of their vectors."""
    return _C.power_fits(max(matrix.shape[0] for matrix in matrices), _device(matrices[0].device)[1])


def run_cuda(matrices: Sequence[Tensor], vectors: Tensor, starts: Sequence[int], tol: float, max_iter: int) -> Results:
    """Iterate matrices of one device in one launch (for each 224 of them) on its current stream, without waiting."""
    device = matrices[0].device
    results = empty_results(len(matrices), matrices[0])
    begin, width = vectors.data_ptr(), vectors.element_size()
    for first in range(0, len(matrices), _C.max_power_matrices):
        part = slice(first, first + _C.max_power_matrices)
        rows = [row_major(matrix) for matrix in matrices[part]]
        group, descriptors = _group(device, tuple((m.shape[0], m.stride(0)) for m in rows))
        workspace = workspace_on(device, group.workspace_bytes)
        _C.power_iteration_cuda(
            group,
            descriptors.data_ptr(),
            workspace.data_ptr(),
            [m.data_ptr() for m in rows],
            [begin + start * width for start in starts[part]],
            tol,
            max_iter,
            [result[first:].data_ptr() for result in results],
            device.index or 0,
            stream_of(device),
        )
    return results


def _check(device: torch.device) -> float:
    """Worst error as a multiple of what is allowed, on a small matrix and on one that a team of blocks shares."""
    rows = torch.sin(torch.arange(12 * 317, dtype=torch.float64, device=device).square() / 7).view(12, 317) + 0.5
    exact_matrices = [x.mT @ x for x in (rows[:, :17], rows[:, 17:])]
    exact = reference.power_iteration(exact_matrices, tol=1e-5)
    vectors = torch.zeros(317, device=device)
    values, _, steps = run_cuda([m.float() for m in exact_matrices], vectors, (0, 17), 1e-5, 100)
    off = max(0, int((steps.cpu() - exact.iterations.cpu()).abs().max()) - 1)
    errors: list[Tensor | float] = [(values / exact.eigenvalues - 1).abs().max(), float(off)]
    errors += [(v - unit).norm() for v, unit in zip(vectors.split((17, 300)), exact.eigenvectors)]
    return worst(errors, 1e-5)


register_family("power_iteration", frozenset({torch.float32}), _check)
