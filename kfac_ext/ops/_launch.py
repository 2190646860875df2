"""What launches on a CUDA device share."""

from __future__ import annotations

import torch
from torch import Tensor


def stream_of(device: torch.device) -> int:
    """The handle of PyTorch's current stream on this device."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def descriptors_on(device: torch.device, operation: str, descriptors: bytes) -> Tensor:
    """A copy of a schedule's plain data for kernels to read; made once for each list of shapes, it waits for the copy.

    Raises:
        RuntimeError: while a CUDA graph is captured, which must not wait.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{operation}: these shapes are new, call it once with them before capturing a CUDA graph")
    return torch.frombuffer(bytearray(descriptors), dtype=torch.uint8).to(device)


def workspace_on(device: torch.device, size: int) -> Tensor:
    """`size` bytes of memory with any content, 256-byte aligned."""
    return torch.empty(size, dtype=torch.uint8, device=device)
