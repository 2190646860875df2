"""Covariances of many layers in one call: collected by hooks, computed together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from kfac_ext.geometry import ConvGeometry, Pair, padded_geometry
from kfac_ext.ops import covariance as single
from kfac_ext.ops._covariance_kernels import (
    Problem,
    conv_problem,
    fits_cuda,
    gradient_problem,
    linear_problem,
    run_cuda,
)
from kfac_ext.ops._library import define, native_device

_OPERATION = "covariance_group"

_LINEAR, _CONV, _GRADIENT = range(3)


class _Call(NamedTuple):
    """What an update does, as the ints that an operator's schema can hold; lists as the conv2d operator has them."""

    kind: int
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    bias: bool = False
    reduce: bool = False

    def to_ints(self) -> list[int]:
        place = (*self.kernel_size, *self.stride, *self.padding, *self.dilation)
        return [self.kind, *place, self.groups, int(self.bias), int(self.reduce)]

    @classmethod
    def from_ints(cls, v: Sequence[int]) -> _Call:
        return cls(
            v[0], (v[1], v[2]), (v[3], v[4]), (v[5], v[6], v[7], v[8]), (v[9], v[10]), v[11], bool(v[12]), bool(v[13])
        )

    def place(self) -> tuple[list[int], list[int], list[int], list[int]]:
        return list(self.kernel_size), list(self.stride), list(self.padding), list(self.dilation)

    def geometry(self, x: Tensor) -> ConvGeometry:
        return padded_geometry(x.shape, *self.place(), self.groups)


_CALL_INTS = len(_Call(_LINEAR).to_ints())


class CovarianceUpdate(NamedTuple):
    """One covariance to be blended into a factor: out <- decay out + scale covariance(x).

    Made by `linear`, `conv2d` or `gradient`, which take what `kfac_ext.linear_covariance_`, `conv2d_covariance_` and
    `gradient_covariance_` take; hooks collect them and `FactorSet.accumulate_` computes all at once.

    Example:
        >>> x = torch.randn(8, 3, 9, 9)
        >>> update = kfac_ext.CovarianceUpdate.conv2d("conv.A", x, 3, padding=1, bias=True, decay=0.95, scale=0.05)
        >>> factors = kfac_ext.FactorSet({"conv.A": 28})
        >>> factors.accumulate_([update])
    """

    key: str
    x: Tensor
    call: tuple[int, ...]
    decay: float
    scale: float

    @staticmethod
    def linear(key: str, x: Tensor, *, bias: bool = False, decay: float = 0.0, scale: float = 1.0) -> CovarianceUpdate:
        """Of the inputs x [..., d] of a linear layer."""
        return CovarianceUpdate(key, x, tuple(_Call(_LINEAR, bias=bias).to_ints()), decay, scale)

    @staticmethod
    def conv2d(
        key: str,
        x: Tensor,
        kernel_size: Pair,
        *,
        stride: Pair = 1,
        padding: Pair | str = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = False,
        mode: str = "expand",
        decay: float = 0.0,
        scale: float = 1.0,
    ) -> CovarianceUpdate:
        """Of the patches that a convolution sees in x [N, C, H, W]; the arguments of `kfac_ext.conv2d_covariance`."""
        reduce = single._reduces(_OPERATION, mode)
        g = single._geometry(x, kernel_size, stride, padding, dilation, groups)
        call = _Call(_CONV, g.kernel_size, g.stride, g.padding, g.dilation, groups, bias, reduce)
        return CovarianceUpdate(key, x, tuple(call.to_ints()), decay, scale)

    @staticmethod
    def gradient(
        key: str, g: Tensor, *, groups: int = 1, mode: str = "expand", decay: float = 0.0, scale: float = 1.0
    ) -> CovarianceUpdate:
        """Of the output gradients g [N, O] or [N, O, H, W]; the arguments of `kfac_ext.gradient_covariance`."""
        call = _Call(_GRADIENT, groups=groups, reduce=single._reduces(_OPERATION, mode))
        return CovarianceUpdate(key, g, tuple(call.to_ints()), decay, scale)


class _Entry(NamedTuple):
    call: _Call
    out: Tensor
    x: Tensor
    decay: float
    scale: float

    def check(self) -> None:
        if self.call.kind == _LINEAR:
            single._check_linear(self.out, self.x, self.call.bias)
        elif self.call.kind == _CONV:
            single._check_conv(self.out, self.x, self.call.geometry(self.x), self.call.bias)
        else:
            single._check_gradient(self.out, self.x, self.call.groups)

    def problem(self) -> Problem:
        call, rest = self.call, (self.decay, self.scale)
        if call.kind == _LINEAR:
            return linear_problem(self.x, self.out, call.bias, *rest)
        if call.kind == _CONV:
            return conv_problem(self.x, self.out, call.geometry(self.x), call.bias, call.reduce, *rest)
        return gradient_problem(self.x, self.out, call.groups, call.reduce, *rest)

    def run_alone(self) -> None:
        call, rest = self.call, (self.decay, self.scale)
        if call.kind == _LINEAR:
            single._linear(self.out, self.x, call.bias, *rest)
        elif call.kind == _CONV:
            single._conv(self.out, self.x, *call.place(), call.groups, call.bias, call.reduce, *rest)
        else:
            single._gradient(self.out, self.x, call.groups, call.reduce, *rest)


def _entries(
    outs: list[Tensor], xs: list[Tensor], calls: list[int], decays: list[float], scales: list[float]
) -> list[_Entry]:
    starts = range(0, len(calls), _CALL_INTS)
    ints = [calls[start : start + _CALL_INTS] for start in starts]
    entries = [_Entry(_Call.from_ints(c), *rest) for c, rest in zip(ints, zip(outs, xs, decays, scales))]
    for entry in entries:  # all of them before the first changes anything
        entry.check()
    return entries


def _group(outs: list[Tensor], xs: list[Tensor], calls: list[int], decays: list[float], scales: list[float]) -> None:
    waiting: list[Problem] = []
    written: set[int] = set()

    def flush() -> None:
        if waiting:
            run_cuda(waiting)
            waiting.clear()
            written.clear()

    for entry in _entries(outs, xs, calls, decays, scales):
        # a launch writes its outs in no order: what goes into the same one again waits for the next
        place = entry.out.data_ptr()
        if place in written:
            flush()
        if not _joins_group(entry.x):
            entry.run_alone()
            continue
        problem = entry.problem()
        if not fits_cuda(problem):
            entry.run_alone()
            continue
        if waiting and waiting[0].image.device != problem.image.device:
            flush()
        waiting.append(problem)
        written.add(place)
    flush()


def _joins_group(x: Tensor) -> bool:
    return not x.is_cpu and native_device(_OPERATION, x, single._FAMILY)


def _group_fake(
    outs: list[Tensor], xs: list[Tensor], calls: list[int], decays: list[float], scales: list[float]
) -> None:
    _entries(outs, xs, calls, decays, scales)


_group_op = define(
    "covariance_group_(Tensor(a!)[] outs, Tensor[] xs, int[] calls, float[] decays, float[] scales) -> ()",
    _group,
    _group_fake,
)


def covariance_group_(outs: Sequence[Tensor], updates: Sequence[CovarianceUpdate]) -> None:
    """outs[i] <- decay_i outs[i] + scale_i covariance of updates[i], for all i in the order given.

    On CUDA one launch of each kernel serves up to 128 updates (1 GiB of workspace), whatever their layers' shapes; on
    the CPU the updates are computed one by one. An out may come twice.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is wanted; no out is changed then.
    """
    _group_op(
        list(outs),
        [update.x.detach() for update in updates],
        [value for update in updates for value in update.call],
        [float(update.decay) for update in updates],
        [float(update.scale) for update in updates],
    )
