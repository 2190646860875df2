"""Variants must compute the same thing before their times are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor


def relative_error(value: Tensor, oracle: Tensor) -> float:
    """|value - oracle| / |oracle|, Frobenius."""
    return float((value.double() - oracle.double()).norm() / oracle.double().norm().clamp_min(1e-300))


def worst_error(values: Sequence[Tensor], oracles: Sequence[Tensor]) -> float:
    """The largest relative error of a list of tensors."""
    return max(relative_error(value, oracle) for value, oracle in zip(values, oracles))


def agreeing(
    variants: Mapping[str, Callable[[], Any]], reference: str, skipped: dict[str, str], tolerance: float = 1e-3
) -> dict[str, Callable[[], Any]]:
    """The variants whose lists of tensors equal those of `reference`; others are skipped, native must not be one.

    Raises:
        AssertionError: native disagrees.
    """
    oracle = _as_list(variants[reference]())
    kept = {}
    for name, run in variants.items():
        error = worst_error(_as_list(run()), oracle)
        if error <= tolerance:
            kept[name] = run
        else:
            assert name != "native", f"native differs from {reference} by {error:.1e}"
            skipped[name] = f"differs from {reference} by {error:.1e}"
    return kept


def _as_list(value: Any) -> list[Tensor]:
    """A stack of scalars (eigenvalues [L]) counts as a list too."""
    return list(value.unbind()) if isinstance(value, Tensor) else list(value)
