"""What every operation shares: the torch library, the choice between native and reference, the common checks."""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from kfac_ext import _C
from kfac_ext._version import __version__
from kfac_ext.geometry import MOST_NUMBERS
from kfac_ext.ops._cuda import cuda_serves, cuda_verdicts, warn_once
from kfac_ext.ops._launch import without_autocast

_LIBRARY = torch.library.Library("kfac_ext", "DEF")

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""The values of kfac::DType."""

_native = os.environ.get("KFAC_NATIVE", "1") != "0"


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register `kfac_ext::<schema>` for all devices with its fake kernel; returns the operator to call.

    Plain PyTorch in the implementation computes in the dtype of its inputs, whatever autocast says where it is called.
    Tensors that the schema marks as changed are refused where autograd would have to know, and counted as changed, so
    that autograd notices where it needs what they held. Errors begin with the operation's name.
    """
    name = schema.split("(", 1)[0]
    arguments = torch._C.parse_schema(f"kfac_ext::{schema}").arguments
    written = {a.name: place for place, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write}
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, _guarded(name, implementation, written), "CompositeExplicitAutograd")
    torch.library.register_fake(f"kfac_ext::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.kfac_ext, name).default


def _guarded(name: str, implementation: Callable[..., Any], written: dict[str, int]) -> Callable[..., Any]:
    operation = name.rstrip("_")

    @wraps(implementation)
    def run(*arguments: Any) -> Any:
        for argument, place in written.items():
            if arguments[place] is None:
                raise TypeError(f"{operation}: {argument} is None, expected a tensor")
        changed = {argument: _tensors(arguments[place]) for argument, place in written.items()}
        for argument, tensors in changed.items():
            check_writable(operation, argument, tensors)
        first = next(iter(_tensors(arguments[0])), None)
        try:
            with nullcontext() if first is None else without_autocast(first.device):
                result = implementation(*arguments)
        except (TypeError, ValueError) as error:  # nothing was changed
            if _NAMED.match(str(error)):
                raise
            raise type(error)(f"{operation}: {error}") from None
        except MemoryError as error:
            _count_changes(changed)
            raise MemoryError(f"{operation}: out of memory ({error})") from None
        except BaseException:
            _count_changes(changed)
            raise
        _count_changes(changed)
        return result

    return run


_NAMED = re.compile(r"[a-z0-9_]+: ")


def _tensors(argument: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return (argument,) if isinstance(argument, Tensor) else argument


def check_writable(operation: str, name: str, tensors: Sequence[Tensor]) -> None:
    """Raise if a tensor that is to be changed in place needs a gradient: what is written has none."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            f"{operation}: {name} requires grad, but what it is changed into has no gradient; "
            "pass a tensor without, or call this under torch.no_grad()"
        )


def _count_changes(changed: dict[str, Sequence[Tensor]]) -> None:
    """Tell autograd that these are not any more what an earlier operation may have kept."""
    for tensors in changed.values():
        increment_version([tensor for tensor in tensors if not tensor.is_inference()])


def native_device(operation: str, tensor: Tensor, family: str) -> bool:
    """Whether native kernels serve `operation` on this tensor's device; warns once where they could but do not.

    Args:
        operation: named in warnings.
        tensor: an input.
        family: the operation's CUDA kernels, as announced by `register_family`.
    """
    if not _native:
        return False
    if tensor.device.type == "cpu":
        return True
    if tensor.device.type == "cuda":
        return cuda_serves(operation, family, tensor)
    warn_once(
        f"kfac_ext.{operation}: there are native kernels for the CPU and for CUDA, none for device "
        f"'{tensor.device.type}'; plain PyTorch runs instead"
    )
    return False


@contextmanager
def _native_restored(previous: bool) -> Iterator[None]:
    global _native
    try:
        yield
    finally:
        _native = previous


def use_native(enabled: bool = True) -> Any:
    """Turn the native kernels on or off for the process; as a context manager, until its end.

    The environment variable KFAC_NATIVE=0 does the same from the start.

    Example:
        >>> with kfac_ext.use_native(False):
        ...     A = kfac_ext.linear_covariance(x)  # plain PyTorch
    """
    global _native
    previous, _native = _native, bool(enabled)
    return _native_restored(previous)


def build_info() -> dict[str, Any]:
    """What is compiled and what runs where: versions, instruction set, threads, CUDA architectures."""
    return {
        "version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "simd": _C.cpu_info()["simd"],
        "threads": f"{torch.get_num_threads()} ({_C.cpu_info()['threads']})",
        "cuda_architectures": _C.cuda_architectures(),
        "cuda_compiler": _C.cuda_compiler or None,
        "cuda_checks": cuda_verdicts(),
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "native": _native,
    }


def check_floating(operation: str, name: str, tensor: Tensor) -> None:
    """Raise unless `tensor` has a dtype the operations compute with, is strided and not empty."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{operation}: {name} is a {type(tensor).__name__}, expected a tensor")
    if tensor.dtype not in DTYPE_CODES:
        raise TypeError(f"{operation}: {name} has dtype {tensor.dtype}, expected float32, float64, bfloat16 or float16")
    if tensor.layout != torch.strided:
        raise TypeError(f"{operation}: {name} has layout {tensor.layout}, expected a dense tensor")
    if tensor.numel() == 0:
        raise ValueError(f"{operation}: {name} is empty, its shape is {tuple(tensor.shape)}")
    if tensor.numel() > MOST_NUMBERS:
        raise ValueError(f"{operation}: {name} has {tensor.numel()} entries, expected at most 2**53")


def check_output(operation: str, out: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raise unless `out` is a contiguous tensor of this shape, dtype and device."""
    if not isinstance(out, Tensor):
        raise TypeError(f"{operation}: out is a {type(out).__name__}, expected a tensor")
    if tuple(out.shape) != shape:
        raise ValueError(f"{operation}: out has shape {tuple(out.shape)}, expected {shape}")
    if out.dtype != dtype:
        raise TypeError(f"{operation}: out has dtype {out.dtype}, expected {dtype}")
    if out.device != device:
        raise ValueError(f"{operation}: out is on {out.device}, the input on {device}: expected the same device")
    if out.layout != torch.strided:
        raise TypeError(f"{operation}: out has layout {out.layout}, expected a dense tensor")
    if not out.is_contiguous():
        raise ValueError(f"{operation}: out is not contiguous, its strides are {out.stride()}")


def check_weights(operation: str, decay: float, scale: float) -> None:
    """Raise unless both weights of a blend are finite numbers."""
    if type(decay) is float and type(scale) is float and math.isfinite(decay + scale):
        return
    for name, value in (("decay", decay), ("scale", scale)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{operation}: {name} is {value!r}, expected a number")
        if not math.isfinite(value):
            raise ValueError(f"{operation}: {name} is {value}, expected a finite number")


def check_flag(operation: str, name: str, value: bool) -> None:
    """Raise unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{operation}: {name} is {value!r}, expected a bool")
