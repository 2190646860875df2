"""Which CUDA kernels serve on which device: those that can run there and were right on a small problem at first use."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from kfac_ext import _C
from kfac_ext.ops._launch import without_autocast

OK, NO_MEMORY = "ok", "no memory is left for their check, which the next call repeats"


class Family(NamedTuple):
    """Operations that share kernels and are trusted together."""

    dtypes: frozenset[torch.dtype]
    """what their inputs may have; others run in plain PyTorch"""
    check: Callable[[torch.device], float]
    """runs the kernels on small problems; the worst error against the reference, as a multiple of what is allowed"""


_families: dict[str, Family] = {}
_verdicts: dict[tuple[str, int], str] = {}
_warned: set[str] = set()


def register_family(name: str, dtypes: frozenset[torch.dtype], check: Callable[[torch.device], float]) -> None:
    """Announce CUDA kernels; `check` calls them directly, it must draw no random numbers."""
    _families[name] = Family(dtypes, check)


def families() -> list[str]:
    """The names that are announced."""
    return list(_families)


def worst(errors: Iterable[Tensor | float], allowed: float) -> float:
    """The largest of some errors as a multiple of what is allowed; NaN counts as infinite."""
    return max(float(torch.as_tensor(error).nan_to_num(nan=torch.inf)) for error in errors) / allowed


def warn_once(message: str) -> None:
    """Warn of `message` the first time it comes up in this process."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=5)


def cuda_serves(operation: str, family: str, tensor: Tensor) -> bool:
    """Whether the family's kernels serve `tensor`, on a CUDA device; warns once with the cause if they do not."""
    if tensor.dtype not in _families[family].dtypes:
        warn_once(f"kfac_ext.{operation}: no CUDA kernels for {tensor.dtype}; plain PyTorch runs instead")
        return False
    key = family, tensor.device.index
    if key not in _verdicts and torch.cuda.is_current_stream_capturing():
        warn_once(
            f"kfac_ext.{operation}: plain PyTorch is captured into this CUDA graph, because the kernels check "
            "themselves at their first use; call the operation once before capturing"
        )
        return False
    verdict = _verdicts.get(key) or _verdict(family, tensor.device)
    if verdict != NO_MEMORY:  # there may be some at the next call
        _verdicts[key] = verdict
    if verdict != OK:
        warn_once(
            f"kfac_ext.{operation}: the CUDA kernels '{family}' do not serve on {tensor.device} "
            f"({torch.cuda.get_device_name(tensor.device)}): {verdict}; plain PyTorch runs instead"
        )
    return verdict == OK


def _verdict(family: str, device: torch.device) -> str:
    architectures = _C.cuda_architectures()
    if not architectures:
        return "this build has none, rebuild with KFAC_CUDA=1 and an nvcc"
    problem = _C.cuda_device_problem(device.index)
    if problem:
        major, minor = torch.cuda.get_device_capability(device)
        return (
            f"compiled with CUDA {_C.cuda_compiler} for {', '.join(architectures)}, device of capability "
            f"{major}.{minor}: {problem}"
        )
    return _self_check(_families[family], device)


def _self_check(family: Family, device: torch.device) -> str:
    try:
        with without_autocast(device):
            error = family.check(device)
    except RuntimeError as failure:
        if isinstance(failure, torch.OutOfMemoryError) or "out of memory" in str(failure):
            return NO_MEMORY
        return f"their check failed: {failure}"
    return OK if error <= 1.0 else f"wrong on a small problem, by {error:.1e} times what is allowed"


def cuda_verdicts() -> dict[str, str]:
    """The outcome of each check so far: 'family on cuda:i' -> 'ok' or why the reference serves."""
    return {f"{family} on cuda:{index}": verdict for (family, index), verdict in _verdicts.items()}
