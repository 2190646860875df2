"""Kernels of damped inverses, called on problems that are already checked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfac_ext import _C, reference
from kfac_ext.ops._cuda import register_family, worst
from kfac_ext.ops._launch import descriptors_on, stream_of, workspace_on
from kfac_ext.ops._library import DTYPE_CODES
from kfac_ext.ops._lists import row_major
from kfac_ext.ops._schedules import Schedules
from kfac_ext.reference.inverse import pi_damping

_Problems = list[tuple[Tensor, Tensor, Tensor]]
"""matrix with contiguous rows; diagonal that is added, or an empty tensor; inverse"""


def _problems(matrices: Sequence[Tensor], diagonals: Sequence[Tensor]) -> _Problems:
    rows = [row_major(matrix) for matrix in matrices]
    inverses = [torch.empty_like(matrix, memory_format=torch.contiguous_format) for matrix in rows]
    added = [d.to(m.dtype).contiguous() for d, m in zip(diagonals, rows)] or [rows[0].new_empty(0)] * len(rows)
    return list(zip(rows, added, inverses))


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.numel() else 0


def run_cpu(matrices: Sequence[Tensor], amounts: Tensor, diagonals: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Inverses and info on the CPU. diagonals: [n_i] or [0] for each matrix, or none at all."""
    problems = _problems(matrices, diagonals)
    specs = [(m.data_ptr(), m.shape[0], m.stride(0), _address(d), inverse.data_ptr()) for m, d, inverse in problems]
    dtype = DTYPE_CODES[matrices[0].dtype]
    info = _C.damped_inverse_cpu(specs, amounts.tolist(), dtype, torch.get_num_threads())
    return [inverse for *_, inverse in problems], torch.tensor(info, dtype=torch.int32)


# ---- CUDA ----


def _make_group(device: torch.device, shapes: tuple[tuple[int, int], ...]) -> tuple[_C.InverseGroup, Tensor]:
    """The schedule for matrices of these sizes and row strides, and its copy on the device."""
    group = _C.InverseGroup(shapes)
    return group, descriptors_on(device, "damped_inverse", group.descriptors())


_group = Schedules(_make_group, lambda found: [found[1]])


def run_cuda(matrices: Sequence[Tensor], amounts: Tensor, diagonals: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Inverses and info of matrices of one device, 160 at a time, on its current stream, without waiting."""
    device = matrices[0].device
    amounts = amounts.contiguous()
    info = amounts.new_empty(len(matrices), dtype=torch.int32)
    problems = _problems(matrices, diagonals)
    for first in range(0, len(problems), _C.max_inverse_matrices):
        part = problems[first : first + _C.max_inverse_matrices]
        group, descriptors = _group(device, tuple((m.shape[0], m.stride(0)) for m, *_ in part))
        workspace = workspace_on(device, group.workspace_bytes)
        _C.damped_inverse_cuda(
            group,
            descriptors.data_ptr(),
            workspace.data_ptr(),
            [(m.data_ptr(), _address(d), inverse.data_ptr()) for m, d, inverse in part],
            amounts[first:].data_ptr(),
            info[first:].data_ptr(),
            device.index or 0,
            stream_of(device),
        )
    return [inverse for *_, inverse in problems], info


def pi_amounts_cuda(matrices: Sequence[Tensor], damping: float, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Amounts [L], float64: sqrt(damping) pi for A and sqrt(damping)/pi for G of each pair, `damping` for the rest."""
    device = matrices[0].device
    amounts = torch.full((len(matrices),), damping, dtype=torch.float64, device=device)

    def spec(place: int) -> tuple[int, int, int, int]:
        matrix = matrices[place]
        return matrix.data_ptr(), matrix.stride(0) + matrix.stride(1) - 1, matrix.shape[0], place

    specs = [(*spec(A), *spec(G)) for A, G in pairs]
    for first in range(0, len(specs), _C.max_pi_pairs):
        part = specs[first : first + _C.max_pi_pairs]
        _C.pi_damping_cuda(part, damping, amounts.data_ptr(), device.index or 0, stream_of(device))
    return amounts


def _check(device: torch.device) -> float:
    """Worst error as a multiple of what is allowed, on matrices of each kind of schedule, beside two that must fail."""
    sizes = (5, 30, 60, 100, 300)
    rows = torch.sin(torch.arange(40 * sum(sizes), dtype=torch.float64, device=device).square() / 7).view(40, -1)
    exact_matrices = [x.mT @ x for x in rows.split(sizes, dim=1)]
    matrices = [m.float() for m in exact_matrices]
    amounts = pi_amounts_cuda(matrices, 1.0, [(0, 1)])
    exact_amounts = pi_damping(exact_matrices, 1.0, [(0, 1)])
    exact, _ = reference.damped_inverse_ex(exact_matrices, exact_amounts)
    failing = [-matrices[0], -matrices[-1]]
    found, info = run_cuda([*matrices, *failing], torch.cat([amounts, amounts.new_zeros(2)]), [])
    errors = [(value - wanted).norm() / wanted.norm() for value, wanted in zip(found, exact)]
    wrong_info = info.cpu() != torch.tensor([0] * len(sizes) + [1, 1])
    return worst([*errors, wrong_info.sum()], 1e-4)


register_family("damped_inverse", frozenset({torch.float32}), _check)
