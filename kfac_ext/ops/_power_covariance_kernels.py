"""Kernels of the matrix-free power iteration, called on inputs that are already checked."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from kfac_ext import _C, reference
from kfac_ext.geometry import ConvGeometry
from kfac_ext.ops._covariance_kernels import conv_shape, rows_as_images, rows_fit
from kfac_ext.ops._cuda import register_family, worst
from kfac_ext.ops._launch import stream_of, workspace_on
from kfac_ext.ops._library import DTYPE_CODES
from kfac_ext.ops._power_kernels import Results, empty_results, to_tensors


def run_covariance_cpu(
    x: Tensor, geometry: ConvGeometry | None, vector: Tensor, bias: bool, tol: float, max_iter: int
) -> Results:
    """Iterate on the CPU with the rows of x, or its patches; the vector becomes the eigenvector."""
    method = (bias, vector.data_ptr(), tol, max_iter, torch.get_num_threads())
    if geometry is None:
        rows = x.reshape(-1, x.shape[-1])
        place = [*rows.shape, *rows.stride()]
        pair = _C.row_covariance_power_iteration_cpu(rows.data_ptr(), DTYPE_CODES[x.dtype], place, *method)
    else:
        shape = list(conv_shape(x, geometry))
        pair = _C.patch_covariance_power_iteration_cpu(
            x.data_ptr(), DTYPE_CODES[x.dtype], list(x.stride()), shape, *method
        )
    return to_tensors([pair], vector)


# ---- CUDA ----


@lru_cache(maxsize=4096)
def _blocks(device: torch.device, n: int) -> int:
    """How many blocks the device holds at once, 0 if vectors of this size do not fit into shared memory."""
    return _C.covariance_power_blocks(n, device.index or 0)


@lru_cache(maxsize=4096)
def _group(
    device: torch.device, dtype: int, strides: tuple[int, ...], shape: tuple[int, ...], n: int, bias: bool
) -> _C.CovariancePowerGroup:
    """The schedule for inputs of this shape; it travels as a kernel parameter, so nothing of it lies on the device."""
    return _C.CovariancePowerGroup(dtype, strides, shape, bias, _blocks(device, n))


def run_covariance_cuda(
    x: Tensor, geometry: ConvGeometry | None, vector: Tensor, bias: bool, tol: float, max_iter: int
) -> Results | None:
    """`run_covariance_cpu` in one launch on the current stream, without waiting; None if the kernel cannot serve x."""
    image, shape = rows_as_images(x) if geometry is None else (x, conv_shape(x, geometry))
    device, n = x.device, len(vector)
    if not rows_fit(shape) or _blocks(device, n) == 0:
        return None
    group = _group(device, DTYPE_CODES[x.dtype], image.stride(), shape, n, bias)
    workspace = workspace_on(device, group.workspace_bytes)
    results = empty_results(1, vector)
    _C.covariance_power_iteration_cuda(
        group,
        image.data_ptr(),
        vector.data_ptr(),
        workspace.data_ptr(),
        tol,
        max_iter,
        [result.data_ptr() for result in results],
        device.index or 0,
        stream_of(device),
    )
    return results


# ---- the kernels' own check ----


def _check(device: torch.device) -> float:
    """Worst error against float64 as a multiple of what is allowed, for each dtype and layout, and for rows."""
    steps = torch.arange(4 * 20 * 19 * 18, dtype=torch.float64, device=device)
    x = (torch.sin(steps.square() / 7).view(4, 20, 19, 18) + 0.5).float()
    place = ConvGeometry((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), (19, 18), 1)
    rows = x.flatten()[: 500 * 50].view(500, 50)
    images = (x, x.contiguous(memory_format=torch.channels_last), x.bfloat16(), x.half())
    return max(*(_error_of(image, place) for image in images), _error_of(rows, None))


def _error_of(x: Tensor, geometry: ConvGeometry | None) -> float:
    kernel, padding = (3, 1) if geometry else (None, 0)
    exact = reference.covariance_power_iteration(x.double(), kernel, padding=padding, bias=True, tol=1e-5)
    vector = torch.zeros(len(exact.eigenvectors[0]), device=x.device)
    found = run_covariance_cuda(x, geometry, vector, True, 1e-5, 100)
    assert found is not None
    values, _, iterations = found
    off = max(0, int((iterations.cpu() - exact.iterations.cpu()).abs().max()) - 1)
    errors = [(values / exact.eigenvalues - 1).abs().max(), (vector - exact.eigenvectors[0]).norm(), float(off)]
    return worst(errors, 1e-5)


register_family("covariance_power_iteration", frozenset({torch.float32, torch.bfloat16, torch.float16}), _check)
