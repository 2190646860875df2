"""What a removal needs where several processes train one model: ranks alike before, and a DDP that fits after."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

if TYPE_CHECKING:
    from torch.nn.parallel import DistributedDataParallel

    from kfac_ext.distributed import Group

_OWN = {"_parameters", "_buffers", "_modules"}  # of a module's attributes, those that the DDP makes anew
_OF_CONSTRUCTION = {"self", "module", "broadcast_buffers", "check_reduction", "bucket_cap_mb", "bucket_cap_mb_list"}
_OF_BUCKETS = ("error_dict", "p_memory_dict", "q_memory_dict")  # what PowerSGD keeps, bucket by bucket


def refuse_wrapped(model: nn.Module, who: str) -> None:
    """Raise ValueError, in the name of `who`, for a network inside of what hands it to several devices or ranks."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ValueError(f"{who}: model is a {type(model).__name__}, expected the network in it: model.module")


def refuse_sharded(model: nn.Module, who: str) -> None:
    """Raise ValueError, in the name of `who` and the first parameter, for a network of which a rank holds a part."""
    for name, parameter in model.named_parameters():
        if type(parameter.data).__name__ == "DTensor":
            raise ValueError(
                f"{who}: {name} is sharded over ranks (fully_shard), of which no neurons can be cut; make the pruner "
                "before, and cut by flatprune.prune_sharded"
            )


@torch.no_grad()
def agree_on_buffers(model: nn.Module, group: Group) -> None:
    """Running statistics become their mean over ranks, all other buffers rank 0's.

    A DDP hands out rank 0's at the next forward, which have seen that rank's part of the batches alone.
    """
    norms = [module for module in model.modules() if isinstance(module, _NormBase)]
    running = {id(b) for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None}
    buffers = list(model.buffers())
    averaged: dict[torch.dtype, list[Tensor]] = {}
    for buffer in buffers:
        if id(buffer) in running:
            averaged.setdefault(buffer.dtype, []).append(buffer)
    for alike in averaged.values():
        for buffer, mean in zip(alike, group.mean(alike, "running statistics")):
            buffer.copy_(mean)
    group.first_([buffer for buffer in buffers if id(buffer) not in running], "other buffers")


@torch.no_grad()
def checksum(model: nn.Module) -> int:
    """A number that differs where a bit of a parameter differs, or two have changed places."""
    total = 0
    for place, parameter in enumerate(model.parameters()):
        kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
        bits = parameter.detach().contiguous().view(kind) if not parameter.is_complex() else parameter.detach().abs()
        total += (place + 1) * int(bits.sum(dtype=torch.int64))
    return total % 2**63


def refuse_unrenewable(ddp: DistributedDataParallel) -> None:
    """Raise ValueError for a DDP that cannot be made anew when its parameters have lost neurons."""
    held = {"mixed_precision": getattr(ddp, "mixed_precision", None) is not None}
    held["delay_all_reduce_named_params"] = bool(getattr(ddp, "_delay_all_reduce_params", ()))
    for name, is_given in held.items():
        if is_given:
            raise ValueError(f"Pruner: the DistributedDataParallel has {name}, with which it cannot be renewed")


def renew(ddp: DistributedDataParallel) -> None:
    """Make a DDP anew, in place: its buckets and hooks are of the parameters as they were when it was made.

    Its constructor runs again with the arguments it had, without sending the weights, which are equal on all ranks.
    Hooks of the module and communication hooks stay; what PowerSGD keeps of its buckets is forgotten.
    """
    kept = {name: value for name, value in vars(ddp).items() if name in vars(nn.Module()) and name not in _OWN}
    hooks = list(getattr(ddp, "_comm_hooks", ()))
    _ddp_class().__init__(ddp, ddp.module, **_arguments(ddp))
    vars(ddp).update(kept)
    for hook, state in hooks:
        for name in _OF_BUCKETS:
            getattr(state, name, {}).clear()
        if hasattr(state, "start_powerSGD_iter"):  # the new buckets are arranged again after the first step
            state.iter = min(state.iter, max(state.start_powerSGD_iter - 2, 0))
        ddp.register_comm_hook(state, hook)


def _arguments(ddp: DistributedDataParallel) -> dict[str, Any]:
    names = inspect.signature(_ddp_class().__init__).parameters
    given = {name: getattr(ddp, name) for name in names if name not in _OF_CONSTRUCTION and hasattr(ddp, name)}
    given["init_sync"] = False
    if "forward_sync_buffers" not in given:
        given["broadcast_buffers"] = getattr(ddp, "broadcast_buffers", True)
    if getattr(ddp, "device_mesh", None) is not None:
        given.pop("process_group", None)
    caps = getattr(ddp, "bucket_bytes_cap_list", ())
    if caps:
        given["bucket_cap_mb_list"] = [cap / 2**20 for cap in caps]
    elif not getattr(ddp, "bucket_bytes_cap_default", False):
        given["bucket_cap_mb"] = ddp.bucket_bytes_cap / 2**20
    return given


def _ddp_class() -> type[DistributedDataParallel]:
    return torch.nn.parallel.DistributedDataParallel
