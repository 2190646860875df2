"""The oracle: a network in which neurons are missing, run without cutting anything and without any labels.

Every entry of a tensor that a neuron owns becomes NaN, and `Gaps` runs the network as if NaN were not there: a sum or a
norm runs over the other entries, a product of matrices leaves them out, and what has only gaps to go by is a gap.
So gaps find their way through the network by themselves; nothing is asked of `flatprune.coupling` but which entries go.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from flatprune.coupling import NeuronGroup

aten = torch.ops.aten
Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}


def rule(*operators: Any) -> Callable[[Rule], Rule]:
    """Enter what runs in place of these operators where an argument has gaps; it gets the operator first."""

    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators, function))
        return function

    return enter


class Gaps(TorchDispatchMode):
    """Runs a network whose tensors have gaps."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Operators that are not in `RULES` carry NaN from entry to entry by themselves."""
        found = RULES.get(func.overloadpacket)
        if found is None or not any(isinstance(a, Tensor) and a.is_floating_point() and a.isnan().any() for a in args):
            return func(*args, **(kwargs or {}))
        return found(func, *args, **(kwargs or {}))


@contextmanager
def plainly() -> Iterator[None]:
    """Attention and recurrent layers as torch composes them from products; no gradients."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter("ignore")  # torch warns of TF32 on Intel GPUs whenever flags are touched
            with torch.backends.mkldnn.flags(enabled=False):
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@torch.no_grad()
def open_gaps(model: nn.Module, groups: Sequence[NeuronGroup], pruned: Mapping[int, Tensor]) -> None:
    """Put NaN at all entries of the neurons pruned, in place.

    Args:
        model: a copy that is not needed any more.
        groups: of the model.
        pruned: position in `groups` -> int64 [m] neurons.
    """
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for position, neurons in pruned.items():
        for member in groups[position].members:
            tensor, entries = tensors[member.names[0]], member.index[neurons].flatten()
            if not tensor.is_floating_point():
                continue
            if member.groups == 1:
                tensor.index_fill_(member.dim, entries, torch.nan)
            else:  # [group, rows, channels of the group, ...]
                size = tensor.shape[member.dim]
                blocks = tensor.unflatten(0, (member.groups, -1))
                blocks[entries // size, :, entries % size] = torch.nan


def _whole(x: Tensor) -> Tensor:
    """Zeros in the gaps."""
    return x.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)


def _all_gaps(x: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    """Where there is nothing but gaps along dimensions (all of them for None)."""
    dims = range(x.dim()) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    gaps = x.isnan()
    for d in sorted((d % max(x.dim(), 1) for d in dims), reverse=True) if x.dim() else ():
        gaps = gaps.all(d, keepdim=keepdim)
    return gaps


@rule(aten.mm, aten.bmm)
def product(func: Any, a: Tensor, b: Tensor) -> Tensor:
    """[..., n, k] times [..., k, m]."""
    gaps = _all_gaps(a, -1)[..., :, None] | _all_gaps(b, -2)[..., None, :]
    return func(_whole(a), _whole(b)).masked_fill_(gaps, torch.nan)


@rule(aten.addmm, aten.baddbmm)
def product_plus(func: Any, bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """Beta bias + alpha a b."""
    both = product(aten.mm if a.dim() == 2 else aten.bmm, a, b)
    return alpha * both + (beta * bias if beta else 0)


@rule(aten.mv, aten.dot, aten.vdot)
def product_of_vector(func: Any, a: Tensor, b: Tensor) -> Tensor:
    """[n, k] or [k] times [k]."""
    return func(_whole(a), _whole(b)).masked_fill_(_all_gaps(a, -1) | b.isnan().all(), torch.nan)


@rule(aten.convolution)
def convolution(
    func: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Tensor:
    """Channels that a weight has no entries for, or whose inputs are all gaps, are gaps."""
    plain = None if bias is None else _whole(bias)
    out = func(_whole(x), _whole(weight), plain, stride, padding, dilation, transposed, output_padding, groups)
    blocks = weight.isnan().flatten(2).all(2).unflatten(0, (groups, -1))  # [groups, out, in], transposed [.., in, out]
    channel = blocks.all(1 if transposed else 2).flatten()
    inputs = x.isnan().transpose(0, 1).flatten(1).all(1).view(groups, -1).all(1)
    channel = channel | inputs.repeat_interleave(len(channel) // groups)
    shape = [1, -1, *[1] * (x.dim() - 2)]
    return out.masked_fill_(channel.view(shape), torch.nan)


@rule(aten._grouped_mm)
def grouped_product(func: Any, a: Tensor, b: Tensor, offs: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """Rows [n, k] of each of several matrices [e, k, m], of which the rows end at `offs`; or [e, n, k] of each."""
    if a.dim() == 3 or offs is None:
        return product(aten.bmm, a, b)
    out = func(_whole(a), _whole(b), offs, *args, **kwargs)
    rows = torch.searchsorted(offs, torch.arange(len(a), dtype=offs.dtype), right=True)  # the matrix of each row
    gaps = _all_gaps(a, -1)[:, None] | _all_gaps(b, -2)[rows]
    return out.masked_fill_(gaps, torch.nan)


@rule(aten.sum, aten.prod, aten.linalg_vector_norm, aten.norm, aten.logsumexp, aten.amax, aten.amin)
def reduction(func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Over the entries that are there."""
    name = func.overloadpacket.__name__
    empty = {"prod": 1.0, "amax": -torch.inf, "amin": torch.inf, "logsumexp": -torch.inf}.get(name, 0.0)
    out = func(torch.where(x.isnan(), empty, x), *args, **kwargs)
    place = 1 if name in ("linalg_vector_norm", "norm") else 0
    dim = args[place] if len(args) > place else kwargs.get("dim")
    return out.masked_fill(_all_gaps(x, dim, keepdim=out.dim() == x.dim()), torch.nan)


@rule(aten.max, aten.min)
def largest(func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Of all entries, or with their places along a dimension."""
    least = -torch.inf if func.overloadpacket is aten.max else torch.inf
    if args and isinstance(args[0], Tensor):  # of two tensors, entry by entry
        return func(x, *args, **kwargs)
    if not args and "dim" not in kwargs:
        return func(torch.where(x.isnan(), least, x))
    values, places = func(torch.where(x.isnan(), least, x), *args, **kwargs)
    gaps = _all_gaps(x, args[0] if args else kwargs["dim"], keepdim=values.dim() == x.dim())
    return values.masked_fill(gaps, torch.nan), places


@rule(aten.mean)
def mean(func: Any, x: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Tensor:
    """Of the entries that are there."""
    return x.nanmean(dim, keepdim=keepdim) if dim is not None else x.nanmean()


@rule(aten.var, aten.std, aten.var_mean, aten.std_mean)
def variance(
    func: Any, x: Tensor, dim: Any = None, unbiased: Any = True, keepdim: bool = False, *, correction: Any = None
) -> Any:
    """Of the entries that are there; `correction` as torch has it."""
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    less = float(unbiased) if correction is None else correction
    dims = list(range(x.dim())) if dim is None else dim
    centre = x.nanmean(dims, keepdim=True)
    count = (~x.isnan()).sum(dims, keepdim=keepdim)
    gaps = _all_gaps(x, dims, keepdim)
    found = (_whole(x - centre).square().sum(dims, keepdim=keepdim) / (count - less)).masked_fill(gaps, torch.nan)
    name = func.overloadpacket.__name__
    found = found.sqrt() if "std" in name else found
    return (found, centre if keepdim else x.nanmean(dims)) if "mean" in name else found


def _normed(x: Tensor, dims: list[int], eps: float, centred: bool) -> Tensor:
    centre = x.nanmean(dims, keepdim=True) if centred else 0
    return (x - centre) * ((x - centre).square().nanmean(dims, keepdim=True) + eps).rsqrt()


@rule(aten.native_layer_norm)
def layer_norm(func: Any, x: Tensor, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> tuple[Tensor, ...]:
    """Mean and variance of the entries that are there."""
    y = _normed(x, list(range(-len(shape), 0)), eps, centred=True)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias, x, x  # what only a backward needs


@rule(aten._fused_rms_norm)
def rms_norm(func: Any, x: Tensor, shape: Sequence[int], weight: Any, eps: float | None) -> tuple[Tensor, ...]:
    """Mean of the squares that are there."""
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    y = _normed(x, list(range(-len(shape), 0)), eps, centred=False)
    return y if weight is None else y * weight, x


@rule(aten.native_group_norm)
def group_norm(
    func: Any, x: Tensor, weight: Any, bias: Any, n: int, channels: int, area: int, groups: int, eps: float
) -> tuple[Tensor, ...]:
    """Mean and variance of the channels of each group that are there."""
    y = _normed(x.reshape(n, groups, -1), [-1], eps, centred=True).reshape(x.shape)
    shape = [1, -1, *[1] * (x.dim() - 2)]
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape), x, x


@rule(aten.native_batch_norm, aten._native_batch_norm_legit, aten._native_batch_norm_legit_no_training)
def batch_norm(func: Any, x: Tensor, weight: Any, bias: Any, *args: Any) -> tuple[Tensor, ...]:
    """By running statistics, or by those of each channel's entries that are there (weights are standardised so)."""
    training = args[-3] if isinstance(args[-3], bool) else False
    if not training:
        return func(x, weight, bias, *args)
    y = _normed(x, [d for d in range(x.dim()) if d != 1], args[-1], centred=True)
    shape = [1, -1, *[1] * (x.dim() - 2)]
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape), x, x


@rule(aten._weight_norm_interface)
def weight_norm(func: Any, v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """G v / |v|, the norm of each slice of a dimension over the entries that are there."""
    others = [d for d in range(v.dim()) if d != dim % v.dim()]
    norm = reduction(aten.linalg_vector_norm.default, v, 2, others, True)
    return v * (g / norm), norm


@rule(aten._softmax, aten._log_softmax, aten._safe_softmax)
def softmax(func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Gaps have no share."""
    return func(torch.where(x.isnan(), -torch.inf, x), *args, **kwargs).masked_fill(x.isnan(), torch.nan)
