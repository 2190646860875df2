"""Forwards on the side: what they must leave as it was, and the modes that they run in."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

_NORM_FORWARDS = (_BatchNorm.forward, _InstanceNorm.forward, nn.SyncBatchNorm.forward)


class RngState(NamedTuple):
    """The states of torch's default generators of the CPU and of one device."""

    cpu: Tensor
    device: torch.device
    accelerator: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RngState:
        """The states as they stand."""
        accelerator = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), device, accelerator)

    def restore(self) -> None:
        """Set the generators to these states."""
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.cuda.set_rng_state(self.accelerator, self.device)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter; the CPU if it has none."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def reading_is_free(device: torch.device) -> bool:
    """Whether the host may look at a tensor there without waiting for work that is queued."""
    return device.type == "cpu"


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`, without waiting for work that is queued there."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@contextmanager
def undisturbed(model: nn.Module, rng: RngState | None = None) -> Iterator[None]:
    """Forwards inside leave random streams, running statistics and other buffers as they were.

    Autocast's casts of parameters are made anew inside and after: parameters may be moved for them, and torch 2.6 takes
    those that are made without gradients into a forward that needs some.

    Args:
        model: batch norms in training mode still normalise by the batch.
        rng: where the random streams stand inside (default: where they are), so that dropout draws the same masks.
    """
    outside = RngState.now(device_of(model))
    norms: list[Any] = [m for m in model.modules() if _is_torch_norm(m) and m.training and m.track_running_stats]
    kept = [
        (module, key, buffer, buffer._version, buffer.clone())
        for module in model.modules()
        if not _is_torch_norm(module)
        for key, buffer in module._buffers.items()
        if buffer is not None
    ]
    torch.clear_autocast_cache()
    try:
        for norm in norms:
            norm.track_running_stats = False
        for module, key, _buffer, _version, copy in kept:
            if isinstance(module, _NormBase):  # torch's kernels update running statistics without a new version
                module._buffers[key] = copy
        if rng is not None:
            rng.restore()
        yield
    finally:
        torch.clear_autocast_cache()
        outside.restore()
        for norm in norms:
            norm.track_running_stats = True
        for module, key, buffer, version, copy in kept:
            module._buffers[key] = buffer
            put_back(buffer, version, copy)


@torch.no_grad()
def put_back(buffer: Tensor, version: int, copy: Tensor) -> None:
    """Give a buffer the values it had at a version, if it was written to since; also its shape, which observers set."""
    if buffer.shape != copy.shape:
        buffer.resize_(copy.shape)
    if buffer._version != version:
        buffer.copy_(copy)


def _is_torch_norm(module: nn.Module) -> bool:
    """Whether it obeys `track_running_stats`, as torch's own norms do; a forward of one's own may not."""
    return isinstance(module, _NormBase) and type(module).forward in _NORM_FORWARDS


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Operators as torch composes them: no fused kernels of oneDNN, cuDNN or attention's fast path."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of TF32 on Intel GPUs whenever flags are touched
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


@contextmanager
def module_modes(modes: Mapping[nn.Module, bool]) -> Iterator[None]:
    """Set the `training` flag of each module alone; put back at the end."""
    before = {module: module.training for module in modes}
    try:
        for module, mode in modes.items():
            module.training = mode
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, batch norms normalise by the batch (those frozen in a training model stay frozen); dropout is off."""
    modes = {
        module: isinstance(module, _BatchNorm) and (module.training or not model.training) for module in model.modules()
    }
    with module_modes(modes):
        yield
