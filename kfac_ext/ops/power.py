"""Dominant eigenpairs by power iteration, of matrices and of covariances that are never formed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from kfac_ext import reference
from kfac_ext.geometry import ConvGeometry, Pair, accumulator_dtype, conv_geometry, is_int, padded_geometry, pair
from kfac_ext.ops._library import check_flag, check_floating, check_writable, define, native_device
from kfac_ext.ops._lists import as_list, check_count, check_squares
from kfac_ext.ops._power_covariance_kernels import run_covariance_cpu, run_covariance_cuda
from kfac_ext.ops._power_kernels import Results, empty_results, fits_cuda, run_cpu, run_cuda
from kfac_ext.reference.power import PowerIteration

__all__ = ["PowerIteration", "covariance_power_iteration", "power_iteration", "power_iteration_"]

_FAMILY, _COVARIANCE_FAMILY = "power_iteration", "covariance_power_iteration"


def _check_method(operation: str, tol: float, max_iter: int) -> None:
    if isinstance(tol, bool) or not (isinstance(tol, (int, float)) and 0 <= tol < math.inf):
        raise ValueError(f"{operation}: tol is {tol!r}, expected a finite number >= 0")
    if not (is_int(max_iter) and 1 <= max_iter < 2**31):
        raise ValueError(f"{operation}: max_iter is {max_iter!r}, expected an int >= 1")


def _check_vector(operation: str, name: str, vector: Tensor, n: int, dtype: torch.dtype, device: torch.device) -> None:
    if not isinstance(vector, Tensor):
        raise TypeError(f"{operation}: {name} is a {type(vector).__name__}, expected a tensor")
    if vector.shape != (n,):
        raise ValueError(f"{operation}: {name} has shape {tuple(vector.shape)}, expected {(n,)}")
    if vector.dtype != dtype:
        raise TypeError(f"{operation}: {name} has dtype {vector.dtype}, expected {dtype}")
    if vector.device != device:
        raise ValueError(f"{operation}: {name} is on {vector.device}, expected {device}")
    if vector.layout != torch.strided:
        raise TypeError(f"{operation}: {name} has layout {vector.layout}, expected a dense tensor")
    if not vector.is_contiguous():
        raise ValueError(f"{operation}: {name} is not contiguous, its strides are {vector.stride()}")


def _take_over(result: PowerIteration, vectors: Sequence[Tensor]) -> Results:
    for vector, found in zip(vectors, result.eigenvectors):
        vector.copy_(found)
    return result.eigenvalues, result.residuals, result.iterations


# ---- matrices ----


def _check_problems(matrices: Sequence[Tensor], vectors: Tensor, starts: Sequence[int]) -> None:
    operation = "power_iteration"
    if not matrices:
        raise ValueError(f"{operation}: matrices is empty")
    like = matrices[0]
    check_squares(operation, "matrices", matrices, like)
    check_count(operation, "starts", len(starts), len(matrices), "matrices")
    size = vectors.numel()
    _check_vector(operation, "vectors", vectors, size, like.dtype, like.device)
    for i, (matrix, start) in enumerate(zip(matrices, starts)):
        if not 0 <= start <= size - matrix.shape[0]:
            raise ValueError(f"{operation}: starts[{i}] is {start}, vectors has {size} entries")


def _power(vectors: Tensor, starts: list[int], matrices: list[Tensor], tol: float, max_iter: int) -> Results:
    _check_problems(matrices, vectors, starts)
    _check_method("power_iteration", tol, max_iter)
    if not native_device("power_iteration", matrices[0], _FAMILY):
        return _run_reference(matrices, vectors, starts, tol, max_iter)
    return _run(matrices, vectors, starts, tol, max_iter)


def _run_reference(matrices: list[Tensor], vectors: Tensor, starts: list[int], tol: float, max_iter: int) -> Results:
    units = [vectors[start : start + matrix.shape[0]] for matrix, start in zip(matrices, starts)]
    return _take_over(reference.power_iteration(matrices, units, tol=tol, max_iter=max_iter), units)


def _run(matrices: list[Tensor], vectors: Tensor, starts: list[int], tol: float, max_iter: int) -> Results:
    if matrices[0].is_cpu:
        return run_cpu(matrices, vectors, starts, tol, max_iter)
    if not fits_cuda(matrices):
        return _run_reference(matrices, vectors, starts, tol, max_iter)
    return run_cuda(matrices, vectors, starts, tol, max_iter)


def _power_fake(vectors: Tensor, starts: list[int], matrices: list[Tensor], tol: float, max_iter: int) -> Results:
    _check_problems(matrices, vectors, starts)
    return empty_results(len(matrices), matrices[0])


_power_op = define(
    "power_iteration_(Tensor(a!) vectors, SymInt[] starts, Tensor[] matrices, float tol, int max_iter) "
    "-> (Tensor, Tensor, Tensor)",
    _power,
    _power_fake,
)


def power_iteration_at_(
    vectors: Tensor, starts: Sequence[int], matrices: Sequence[Tensor], *, tol: float, max_iter: int
) -> Results:
    """`power_iteration_` with all vectors in one tensor [n], that of matrix i from starts[i] on; mutated.

    Returns:
        Eigenvalues, residuals, iterations.
    """
    _check_method("power_iteration", tol, max_iter)
    if not matrices:
        return torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.int32)
    return _power_op(vectors, starts, matrices, tol, max_iter)


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where each of these begins, one after the other."""
    return [0, *accumulate(sizes)][:-1]


def _sizes(matrices: Sequence[Tensor]) -> list[int]:
    try:
        return [matrix.shape[0] for matrix in matrices]
    except IndexError:  # no dimensions
        check_squares("power_iteration", "matrices", matrices, matrices[0])
        raise


def _joined(matrices: Sequence[Tensor], sizes: Sequence[int], vectors: Sequence[Tensor]) -> Tensor:
    """Copies of the vectors, one after the other; raise unless each goes with its matrix."""
    operation = "power_iteration"
    check_count(operation, "vectors", len(vectors), len(matrices), "matrices")
    if not vectors:
        return torch.zeros(0)
    dtype, device = matrices[0].dtype, matrices[0].device
    for i, (n, vector) in enumerate(zip(sizes, vectors)):
        if vector.shape != (n,) or vector.dtype != dtype or vector.device != device or vector.layout != torch.strided:
            check_squares(operation, "matrices", matrices, matrices[0])  # which may be at fault, too
            _check_vector(operation, f"vectors[{i}]", vector, n, dtype, device)
    return torch.cat(list(vectors))


def power_iteration_(
    vectors: Sequence[Tensor], matrices: Sequence[Tensor], *, tol: float = 1e-3, max_iter: int = 100
) -> PowerIteration:
    """`power_iteration` from `vectors`, which become the eigenvectors.

    Args:
        vectors: one [n_i] a matrix, of its dtype and device; mutated.
        matrices, tol, max_iter: as for `power_iteration`.

    Returns:
        PowerIteration, whose `eigenvectors` are `vectors`.

    Raises:
        TypeError, ValueError: naming the argument and its place in the list; no vector is changed then.

    Example:
        >>> A, v = torch.eye(3), torch.ones(3)
        >>> kfac_ext.power_iteration_([v], [A]).eigenvalues
        tensor([1.0000])
    """
    symmetric, units = as_list("power_iteration", "matrices", matrices), as_list("power_iteration", "vectors", vectors)
    check_writable("power_iteration", "vectors", list(vectors))
    sizes = _sizes(symmetric)
    flat = _joined(symmetric, sizes, units)
    values, residuals, iterations = power_iteration_at_(flat, _starts(sizes), symmetric, tol=tol, max_iter=max_iter)
    if units:
        torch._foreach_copy_(units, list(flat.split(sizes)))
    return PowerIteration(values, list(vectors), residuals, iterations)


def power_iteration(
    matrices: Sequence[Tensor],
    vectors: Sequence[Tensor] | None = None,
    *,
    tol: float = 1e-3,
    max_iter: int = 100,
) -> PowerIteration:
    """Dominant eigenpair of every symmetric matrix: v <- A v / |A v| until |A v - lambda v| <= tol |lambda|.

    lambda = v^T A v, an eigenvalue of largest magnitude; all matrices and all iterations in one call, each matrix
    stopping on its own. The error of lambda is of the order of residual^2: tol 1e-2 gives it to about 2e-4, 1e-3 to
    2e-6, where the next eigenvalue is not close.

    Args:
        matrices: list of symmetric [n_i, n_i], float32 or float64, of one dtype and device. On the CPU only the
            lower triangle of a large one is read. A matrix whose rows are not contiguous is copied first.
        vectors: where to start, one [n_i] a matrix, of any length; a zero or non-finite one is replaced by the
            default, a fixed vector that no natural eigenvector is orthogonal to.
        tol: bound on the residual |A v - lambda v| / |lambda|.
        max_iter: products A v at most.

    On a GPU, float32 matrices are iterated in one launch, which reads whole matrices and never waits for the host.

    Returns:
        PowerIteration: `eigenvalues` [L], `eigenvectors` list of [n_i], `residuals` [L], `iterations` [L] int32. The
        residual is that of the vector which gave lambda; the eigenvector returned is one step further. A matrix that
        is not finite has eigenvalue and residual NaN and keeps its start; the zero matrix has 0 and 0.

    Raises:
        TypeError, ValueError: naming the argument and its place in the list.

    Example:
        >>> kfac_ext.power_iteration([torch.diag(torch.tensor([3.0, 1.0]))], tol=1e-6).eigenvalues
        tensor([3.])
    """
    symmetric = as_list("power_iteration", "matrices", matrices)
    sizes = _sizes(symmetric)
    if vectors is not None:
        flat = _joined(symmetric, sizes, as_list("power_iteration", "vectors", vectors))
    else:  # zero: replaced by the default start
        flat = symmetric[0].new_zeros(sum(sizes)) if symmetric else torch.zeros(0)
    values, residuals, iterations = power_iteration_at_(flat, _starts(sizes), symmetric, tol=tol, max_iter=max_iter)
    return PowerIteration(values, list(torch.unsafe_split_with_sizes(flat, sizes)), residuals, iterations)


# ---- covariances ----


def _covariance_size(x: Tensor, kernel_size: Sequence[int], bias: bool) -> int:
    return (x.shape[1] * kernel_size[0] * kernel_size[1] if kernel_size else x.shape[-1]) + int(bias)


def _check_covariance(x: Tensor, vector: Tensor, kernel_size: list[int], bias: bool, **moves: list[int]) -> None:
    operation = "covariance_power_iteration"
    for name, move in moves.items():
        if move and not kernel_size:
            raise ValueError(f"{operation}: {name} is {move}, expected [] without a kernel_size")
    check_floating(operation, "x", x)
    if x.dim() == 0 or (kernel_size and x.dim() != 4):
        wanted = "4: [N, C, H, W]" if kernel_size else "at least 1: [..., d]"
        raise ValueError(f"{operation}: x has {x.dim()} dimensions {tuple(x.shape)}, expected {wanted}")
    n = _covariance_size(x, kernel_size, bias)
    _check_vector(operation, "vector", vector, n, accumulator_dtype(x.dtype), x.device)


def _covariance(
    vector: Tensor,
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    bias: bool,
    tol: float,
    max_iter: int,
) -> Results:
    check_floating("covariance_power_iteration", "x", x)
    geometry = padded_geometry(x.shape, kernel_size, stride, padding, dilation) if kernel_size else None
    _check_covariance(x, vector, kernel_size, bias, stride=stride, padding=padding, dilation=dilation)
    _check_method("covariance_power_iteration", tol, max_iter)
    if native_device("covariance_power_iteration", x, _COVARIANCE_FAMILY):
        found = _run_covariance(x, geometry, vector, bias, tol, max_iter)
        if found is not None:
            return found
    image = torch.nn.functional.pad(x, padding) if kernel_size else x
    result = reference.covariance_power_iteration(
        image, kernel_size or None, vector, stride=stride, dilation=dilation, bias=bias, tol=tol, max_iter=max_iter
    )
    return _take_over(result, [vector])


def _run_covariance(
    x: Tensor, geometry: ConvGeometry | None, vector: Tensor, bias: bool, tol: float, max_iter: int
) -> Results | None:
    """By a kernel; None, and nothing is done, if none serves x."""
    return (run_covariance_cpu if x.is_cpu else run_covariance_cuda)(x, geometry, vector, bias, tol, max_iter)


def _covariance_fake(
    vector: Tensor,
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    bias: bool,
    tol: float,
    max_iter: int,
) -> Results:
    _check_covariance(x, vector, kernel_size, bias, stride=stride, padding=padding, dilation=dilation)
    return empty_results(1, vector)


def _check_still(**moves: tuple[Pair | str, int]) -> None:
    """Raise ValueError for a move, given beside its default, that a layer without a kernel does not make."""
    for name, (value, default) in moves.items():
        if isinstance(value, str) or pair(value, name) != (default, default):
            raise ValueError(f"{name} is {value!r}, expected {default} without a kernel_size")


_covariance_op = define(
    "covariance_power_iteration_(Tensor(a!) vector, Tensor x, int[] kernel_size, int[] stride, int[] padding, "
    "int[] dilation, bool bias, float tol, int max_iter) -> (Tensor, Tensor, Tensor)",
    _covariance,
    _covariance_fake,
)


def covariance_power_iteration(
    x: Tensor,
    kernel_size: Pair | None = None,
    vector: Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    bias: bool = False,
    tol: float = 1e-3,
    max_iter: int = 100,
) -> PowerIteration:
    """Dominant eigenpair of the covariance of a layer's inputs, never formed: A v = 1/R sum over rows a of (a.v) a.

    The A of `linear_covariance(x, bias=bias)`, or with a kernel size that of `conv2d_covariance(x, kernel_size, ...)`
    with mode 'expand': there a.v is the convolution of x with the one filter v, and neither A nor a patch is written
    to memory. Each iteration reads x once. On a GPU all iterations are one launch, which never waits for the host.

    Args:
        x: [..., d], or [N, C, H, W] with a kernel size; float32, float64, bfloat16 or float16, any strides.
        kernel_size: of the convolution; None for a linear layer.
        vector: where to start, [d(+1)] or [C kh kw (+1)], float32 (float64 for float64 x); not changed. A zero or
            non-finite one is replaced by the default.
        stride, padding, dilation: as for `torch.nn.Conv2d` (padding 'same' and 'valid' too); only with a kernel size.
        bias: append 1 to every row.
        tol, max_iter: as for `power_iteration`.

    Returns:
        PowerIteration of one matrix, as from `power_iteration`.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is wanted.

    Example:
        >>> pair = kfac_ext.covariance_power_iteration(torch.randn(8, 16, 32, 32), 3, padding=1)
        >>> pair.eigenvectors[0].shape
        torch.Size([144])
    """
    operation = "covariance_power_iteration"
    check_floating(operation, "x", x)
    check_flag(operation, "bias", bias)
    _check_method(operation, tol, max_iter)
    dtype = accumulator_dtype(x.dtype)
    steps: tuple[Sequence[int], ...] = ((), (), (), ())
    try:
        if kernel_size is None:
            _check_still(stride=(stride, 1), padding=(padding, 0), dilation=(dilation, 1))
        else:
            geometry = conv_geometry(x.shape, kernel_size, stride, padding, dilation, 1)
            steps = (geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation)
    except ValueError as error:
        raise ValueError(f"{operation}: {error}") from None
    if kernel_size is None and x.dim() == 0:
        raise ValueError(f"{operation}: x has 0 dimensions, expected at least 1: [..., d]")
    if vector is None:
        vector = x.new_zeros(_covariance_size(x, steps[0], bias), dtype=dtype)
    if not isinstance(vector, Tensor) or vector.layout != torch.strided:
        given = vector.layout if isinstance(vector, Tensor) else type(vector).__name__
        raise TypeError(f"{operation}: vector is a {given}, expected a dense tensor")
    unit = vector.detach().clone(memory_format=torch.contiguous_format)
    values, residuals, iterations = _covariance_op(unit, x.detach(), *steps, bias, tol, max_iter)
    return PowerIteration(values, [unit], residuals, iterations)
