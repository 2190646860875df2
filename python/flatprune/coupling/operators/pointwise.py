"""Elementwise operators, and those that make tensors."""

from __future__ import annotations

from torch import Tensor

from flatprune.coupling import algebra
from flatprune.coupling.operators.table import Operation, rule
from flatprune.coupling.values import Value


@rule(
    "add hardswish prelu _prelu_kernel rsub masked_fill where log_sigmoid_forward rrelu_with_noise "
    "clamp_min clamp_max bitwise_not addcmul addcdiv lerp fmod remainder"
)
def pointwise(op: Operation) -> list[Value]:
    """Layers that vary along a common dimension are one."""
    combined = algebra.combine(op.labels, [op.value_of(t) for t in op.tensors], op.shape)
    return [combined if tuple(t.shape) == op.shape else Value(tuple(t.shape)) for t in op.outputs]


@rule(
    "clone contiguous _to_copy lift_fresh lift_fresh_copy native_dropout dropout _fused_dropout triu tril to _conj "
    "resolve_conj resolve_neg nan_to_num bernoulli _conj_physical"
)
def keep(op: Operation) -> list[Value]:
    """The same entries, with other values."""
    value = op.value()
    return [value.having(size=tuple(t.shape)) for t in op.outputs]


@rule(
    "zeros_like ones_like empty_like rand_like randn_like full_like fill zero uniform normal random exponential "
    "cauchy log_normal geometric normal_functional"
)
def like(op: Operation) -> Value:
    """A tensor of the same entries, filled."""
    value = op.value()
    return Value(value.size, value.layers, free=value.free)


@rule("new_zeros new_ones new_empty new_full new_empty_strided")
def new(op: Operation) -> Value:
    """A tensor made in the forward: its size follows what it meets."""
    return Value(op.shape, free=True)


@rule("glu")
def glu(op: Operation) -> Value:
    """One half gates the other."""
    value, dim = op.value(), op.argument("dim", -1)
    half = value.size[dim] // 2

    def part(start: int) -> Value:
        return algebra.moved(value, lambda full: full.narrow(dim, start, half), op.shape)

    return algebra.combine(op.labels, [part(0), part(half)], op.shape)


@rule(
    "_softmax _safe_softmax _log_softmax softmax log_softmax cumsum cumprod cummax cummin sort topk logcumsumexp "
    "kthvalue mode argsort"
)
def along(op: Operation) -> list[Value]:
    """What mixes entries of one dimension: labels that differ along it alone cannot go, beside others they are one."""
    value = algebra.collapsed(op.labels, op.value(), [op.argument("dim", -1)], "its channels are mixed by")
    return [value.having(size=tuple(t.shape)) for t in op.outputs]


_SPATIAL_DIMS = {"1": 1, "2": 2, "3": 3}


@rule(
    "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d "
    "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d upsample_nearest1d upsample_nearest2d "
    "upsample_nearest3d upsample_bilinear2d upsample_bicubic2d upsample_linear1d upsample_trilinear3d "
    "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa grid_sampler_2d grid_sampler_3d reflection_pad1d reflection_pad2d reflection_pad3d "
    "replication_pad1d replication_pad2d replication_pad3d max_unpool2d max_unpool3d fractional_max_pool2d"
)
def spatial(op: Operation) -> list[Value]:
    """Pooling and resizing: labels over positions are one within a channel."""
    dims = next((n for digit, n in _SPATIAL_DIMS.items() if digit in op.name), 2)
    value = algebra.collapsed(op.labels, op.value(), range(-dims, 0))
    return [value.having(size=tuple(t.shape)) for t in op.outputs]


def vector(value: Value, rank: int, dim: int) -> Value:
    """A vector [n] as it lies along dimension `dim` of a tensor of that rank."""
    return value.shaped([0 if d == dim else None for d in range(rank)])


def along_channels(op: Operation, tensors: list[Tensor | None], rank: int) -> list[Value]:
    """Vectors of channels, for tensors [N, C, ...]."""
    return [vector(op.value_of(t), rank, 1) for t in tensors if isinstance(t, Tensor)]
