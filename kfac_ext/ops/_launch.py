"""What launches on a CUDA device share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor


def stream_of(device: torch.device) -> int:
    """The handle of PyTorch's current stream on this device."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def tf32_allowed() -> bool:
    """Whether PyTorch may multiply float32 matrices in tf32 on CUDA, whichever of its settings says so."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # since torch 2.9; once it was used, the older question is an error
        return matmul.fp32_precision == "tf32"
    return torch.get_float32_matmul_precision() != "highest"


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Where products of PyTorch have the dtype of their inputs."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Matmuls of PyTorch in the dtype of their inputs, those of float32 on CUDA in full float32."""
    matmul = torch.backends.cuda.matmul
    name, full = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, name)
    setattr(matmul, name, full)
    try:
        with without_autocast(device):
            yield
    finally:
        setattr(matmul, name, before)


def descriptors_on(device: torch.device, operation: str, descriptors: bytes) -> Tensor:
    """A copy of a schedule's plain data for kernels to read, made once for each list of shapes.

    It does not wait for the device, but where no memory can be pinned.

    Raises:
        RuntimeError: while a CUDA graph is captured, which would copy at every replay.
    """
    data = torch.frombuffer(bytearray(descriptors), dtype=torch.uint8)
    if device.type != "cuda":
        return data
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{operation}: these shapes are new, call it once with them before capturing a CUDA graph")
    with suppress(RuntimeError):
        data = data.pin_memory()  # which PyTorch keeps until it has been read
    return data.to(device, non_blocking=True)


def workspace_on(device: torch.device, size: int) -> Tensor:
    """`size` bytes of memory with any content, 256-byte aligned."""
    return torch.empty(size, dtype=torch.uint8, device=device)
