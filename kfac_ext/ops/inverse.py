"""Damped inverses of a list of symmetric positive definite matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kfac_ext import reference
from kfac_ext.geometry import is_int
from kfac_ext.ops._inverse_kernels import pi_amounts_cuda, run_cpu, run_cuda
from kfac_ext.ops._library import define, native_device
from kfac_ext.ops._lists import as_list, check_count, check_squares

__all__ = ["damped_inverse", "damped_inverse_ex"]

_OPERATION = _FAMILY = "damped_inverse"


def _check(matrices: Sequence[Tensor], amounts: Tensor, diagonals: Sequence[Tensor]) -> None:
    if not matrices:
        raise ValueError(f"{_OPERATION}: matrices is empty")
    check_squares(_OPERATION, "matrices", matrices, matrices[0])
    if amounts.dtype != torch.float64 or amounts.dim() != 1 or amounts.device != matrices[0].device:
        raise ValueError(
            f"{_OPERATION}: amounts is {amounts.dtype} {tuple(amounts.shape)} on {amounts.device}, expected float64 "
            "[matrices] where the matrices are"
        )
    check_count(_OPERATION, "damping", len(amounts), len(matrices), "matrices")
    if not diagonals:
        return
    check_count(_OPERATION, "diagonals", len(diagonals), len(matrices), "matrices")
    for i, (matrix, diagonal) in enumerate(zip(matrices, diagonals)):
        if diagonal.device != matrix.device or not (diagonal.is_floating_point() or not diagonal.numel()):
            raise ValueError(
                f"{_OPERATION}: damping[{i}] is {diagonal.dtype} on {diagonal.device}, expected floating-point numbers "
                f"on {matrix.device}"
            )
        if diagonal.numel() and tuple(diagonal.shape) != (matrix.shape[0],):
            raise ValueError(
                f"{_OPERATION}: damping[{i}] has shape {tuple(diagonal.shape)}, expected () or {(matrix.shape[0],)}"
            )


def _inverse(
    matrices: list[Tensor], amounts: Tensor, diagonals: list[Tensor], strict: bool
) -> tuple[list[Tensor], Tensor]:
    _check(matrices, amounts, diagonals)
    if native_device(_OPERATION, matrices[0], _FAMILY):
        inverses, info = _run(matrices, amounts, diagonals)
    else:
        inverses, info = _reference(matrices, amounts, diagonals)
    if strict or matrices[0].is_cpu:  # elsewhere to look at info is to wait
        failed = _retry_in_double(matrices, amounts, diagonals, inverses, info)
        if strict and failed:
            raise torch.linalg.LinAlgError(f"{_OPERATION}: matrices {failed} are not positive definite")
    return inverses, info


def _run(matrices: list[Tensor], amounts: Tensor, diagonals: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    return (run_cpu if matrices[0].is_cpu else run_cuda)(matrices, amounts, diagonals)


def _reference(matrices: list[Tensor], amounts: Tensor, diagonals: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    damping = [d.to(m.dtype) for d, m in zip(_per_matrix(amounts, diagonals), matrices)]
    return reference.damped_inverse_ex(matrices, damping)


def _per_matrix(amounts: Tensor, diagonals: Sequence[Tensor]) -> list[Tensor]:
    """The damping of each matrix as one tensor, 0-d or [n_i]."""
    if not diagonals:
        return list(amounts.unbind())
    return [amount + d if d.numel() else amount for amount, d in zip(amounts.unbind(), diagonals)]


def _retry_in_double(
    matrices: list[Tensor], amounts: Tensor, diagonals: list[Tensor], inverses: list[Tensor], info: Tensor
) -> list[int]:
    """Invert what failed in float32 once more in float64, which bears a condition 1e8 times as large; what fails."""
    failed = info.nonzero().flatten().tolist()
    if not failed or matrices[0].dtype != torch.float32:
        return failed
    damping = _per_matrix(amounts, diagonals)
    for i in failed.copy():
        double, flag = reference.damped_inverse_ex([matrices[i].double()], [damping[i]])
        if not flag.any():
            inverses[i].copy_(double[0])
            info[i] = 0
            failed.remove(i)
    return failed


def _fake(
    matrices: list[Tensor], amounts: Tensor, diagonals: list[Tensor], strict: bool
) -> tuple[list[Tensor], Tensor]:
    _check(matrices, amounts, diagonals)
    inverses = [torch.empty_like(matrix, memory_format=torch.contiguous_format) for matrix in matrices]
    return inverses, amounts.new_empty(len(matrices), dtype=torch.int32)


_inverse_op = define(
    "damped_inverse(Tensor[] matrices, Tensor amounts, Tensor[] diagonals, bool strict) -> (Tensor[], Tensor)",
    _inverse,
    _fake,
)


# ---- the forms that damping comes in ----


def _checked_amount(name: str, amount: float) -> float:
    if isinstance(amount, bool) or not isinstance(amount, (int, float)):
        raise TypeError(f"{_OPERATION}: {name} is a {type(amount).__name__}, expected a number or a tensor")
    if not (math.isfinite(amount) and amount >= 0):
        raise ValueError(f"{_OPERATION}: {name} is {amount}, expected a finite number >= 0")
    return float(amount)


def _stacked(scalars: list[float | Tensor], device: torch.device) -> Tensor:
    """Amounts [L], float64. Nothing is copied from the host: that would wait, and could not be captured in a graph."""
    if all(isinstance(scalar, float) for scalar in scalars) and device.type == "cpu":
        return torch.tensor(scalars, dtype=torch.float64)
    amounts = torch.empty(len(scalars), dtype=torch.float64, device=device)
    for amount, scalar in zip(amounts.unbind(), scalars):
        amount.copy_(scalar.detach()) if isinstance(scalar, Tensor) else amount.fill_(scalar)
    return amounts


def _split(matrices: list[Tensor], damping: float | Sequence[float | Tensor] | Tensor) -> tuple[Tensor, list[Tensor]]:
    """Amounts [L], float64, for the whole diagonals; and a tensor [n_i] (or [0]) for each if any was given."""
    device = matrices[0].device
    if isinstance(damping, Tensor) and not damping.is_floating_point():
        raise TypeError(f"{_OPERATION}: damping has dtype {damping.dtype}, expected floating-point numbers")
    if isinstance(damping, Tensor) and damping.dim() == 0:
        return damping.detach().to(device, torch.float64).expand(len(matrices)), []
    if not isinstance(damping, (Sequence, Tensor)):
        amount = _checked_amount("damping", damping)
        return torch.full((len(matrices),), amount, dtype=torch.float64, device=device), []
    check_count(_OPERATION, "damping", len(damping), len(matrices), "matrices")
    scalars, diagonals = [], []
    none = torch.empty(0, device=device)
    for i, entry in enumerate(damping):
        is_tensor = isinstance(entry, Tensor)
        if is_tensor and not entry.is_floating_point():
            raise TypeError(f"{_OPERATION}: damping[{i}] has dtype {entry.dtype}, expected floating-point numbers")
        if is_tensor and entry.device != device:
            raise ValueError(f"{_OPERATION}: damping[{i}] is on {entry.device}, the matrices on {device}")
        is_diagonal = is_tensor and entry.dim() > 0
        diagonals.append(entry.detach() if is_diagonal else none)
        scalars.append(0.0 if is_diagonal else entry if is_tensor else _checked_amount(f"damping[{i}]", entry))
    amounts = _stacked(scalars, device)
    return amounts, diagonals if any(d is not none for d in diagonals) else []


def _checked_pairs(pi: Sequence[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    if not isinstance(pi, Sequence) or isinstance(pi, str):
        raise TypeError(f"{_OPERATION}: pi is a {type(pi).__name__}, expected a list of pairs of indices")
    pairs: list[tuple[int, int]] = []
    seen: set[int] = set()
    for k, indices in enumerate(pi):
        if not (isinstance(indices, Sequence) and len(indices) == 2 and all(is_int(i) for i in indices)):
            raise TypeError(f"{_OPERATION}: pi[{k}] is {indices!r}, expected two indices of matrices")
        pairs.append((indices[0], indices[1]))
        for index in indices:
            if not 0 <= index < count:
                raise ValueError(f"{_OPERATION}: pi[{k}] is {indices}, expected indices of the {count} matrices")
            if index in seen:
                raise ValueError(f"{_OPERATION}: pi[{k}] is {indices}, but matrix {index} is in a pair already")
            seen.add(index)
    return pairs


def _pi_amounts(matrices: list[Tensor], damping: float, pairs: list[int]) -> Tensor:
    if not matrices:
        raise ValueError(f"{_OPERATION}: matrices is empty")
    check_squares(_OPERATION, "matrices", matrices, matrices[0])
    _checked_amount("damping", damping)
    if len(pairs) % 2:
        raise ValueError(f"{_OPERATION}: pairs has {len(pairs)} indices, expected two for each pair")
    listed = _checked_pairs(list(zip(pairs[::2], pairs[1::2])), len(matrices))
    if not matrices[0].is_cpu and native_device(_OPERATION, matrices[0], _FAMILY):
        return pi_amounts_cuda(matrices, damping, listed)
    means = torch.stack([matrix.trace() / matrix.shape[0] for matrix in matrices]).double()
    amounts = torch.full_like(means, damping)
    if listed:
        A, G = torch.tensor(listed, device=means.device).unbind(1)
        ratio = (means[A] / means[G]).sqrt()
        ratio = torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
        amounts[A], amounts[G] = damping**0.5 * ratio, damping**0.5 / ratio
    return amounts


def _pi_amounts_fake(matrices: list[Tensor], damping: float, pairs: list[int]) -> Tensor:
    return matrices[0].new_empty(len(matrices), dtype=torch.float64)


_pi_op = define("pi_damping(Tensor[] matrices, float damping, int[] pairs) -> Tensor", _pi_amounts, _pi_amounts_fake)


def _amounts(
    matrices: list[Tensor],
    damping: float | Sequence[float | Tensor] | Tensor,
    pi: Sequence[tuple[int, int]] | None,
) -> tuple[Tensor, list[Tensor]]:
    """What is added to the diagonals: amounts [L], and tensors [n_i] (or [0]) if any was given."""
    if pi is None:
        return _split(matrices, damping)
    amount = _checked_amount("damping, with pi one for all,", damping)  # type: ignore[arg-type]
    check_squares(_OPERATION, "matrices", matrices, matrices[0])
    pairs = _checked_pairs(pi, len(matrices))
    return _pi_op(matrices, amount, [index for pair in pairs for index in pair]), []


def damped_inverse_ex(
    matrices: Sequence[Tensor],
    damping: float | Sequence[float | Tensor] | Tensor,
    *,
    pi: Sequence[tuple[int, int]] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """`damped_inverse` that does not raise where a matrix is not positive definite but says so in `info`.

    Args:
        matrices, damping, pi: as for `damped_inverse`.

    Returns:
        The list of inverses, and info [L] int32: 0, or k where the leading minor of order k of M_i + D_i is not
        positive or not finite; that inverse is NaN then. On the CPU a float32 matrix that fails is inverted in
        float64 by torch.linalg before it is given up. On a GPU that would mean to wait for `info`: this function does
        not wait, and leaves the second attempt to `damped_inverse`.

    Raises:
        TypeError, ValueError: naming the argument and its place in the list.

    Example:
        >>> _, info = kfac_ext.damped_inverse_ex([torch.eye(2), -torch.eye(2)], 0.5)
        >>> info
        tensor([0, 1], dtype=torch.int32)
    """
    return _inverses(matrices, damping, pi, strict=False)


def _inverses(
    matrices: Sequence[Tensor],
    damping: float | Sequence[float | Tensor] | Tensor,
    pi: Sequence[tuple[int, int]] | None,
    *,
    strict: bool,
) -> tuple[list[Tensor], Tensor]:
    """`damped_inverse_ex`, or if `strict` with the error of `damped_inverse`, raised where a compiled graph runs it."""
    symmetric = as_list(_OPERATION, "matrices", matrices)
    if not symmetric:
        return [], torch.zeros(0, dtype=torch.int32)
    return _inverse_op(symmetric, *_amounts(symmetric, damping, pi), strict)


def damped_inverse(
    matrices: Sequence[Tensor],
    damping: float | Sequence[float | Tensor] | Tensor,
    *,
    pi: Sequence[tuple[int, int]] | None = None,
) -> list[Tensor]:
    """(M_i + D_i)^-1 of every symmetric positive definite matrix, D_i = damping I or a diagonal; exactly symmetric.

    The two Kronecker factors of a layer, damped apart, stand for the damped product:
    (A (x) G + lambda I)^-1 ~ (A + pi sqrt(lambda) I)^-1 (x) (G + sqrt(lambda)/pi I)^-1 with
    pi = sqrt(mean diag A / mean diag G) (Martens & Grosse 2015, section 6.3).

    Args:
        matrices: list of [n_i, n_i], float32 or float64, of one dtype and device; the lower triangle is read.
        damping: a number for all; or a list with a number, a 0-d tensor or a tensor [n_i] (one amount for each
            diagonal entry) for each matrix.
        pi: pairs (index of A, index of G) in `matrices` whose damping is pi-corrected, `damping` being lambda;
            matrices in no pair get lambda itself.

    Returns:
        One new contiguous [n_i, n_i] a matrix.

    Raises:
        torch.linalg.LinAlgError: naming the matrices that are not positive definite, in float64 either. To know it,
            this function waits for the device, as `damped_inverse_ex` does not.
        TypeError, ValueError: naming the argument and its place in the list.

    Example:
        >>> kfac_ext.damped_inverse([torch.eye(2)], 1.0)
        [tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])]
    """
    return _inverses(matrices, damping, pi, strict=True)[0]
