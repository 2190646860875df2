"""Covariances of many layers in one call: collected by hooks, computed together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_ext.geometry import ConvGeometry, Pair, padded_geometry, remembered
from kfac_ext.ops import covariance as single
from kfac_ext.ops._covariance_kernels import (
    Launch,
    Problem,
    conv_problem,
    fits_cuda,
    gradient_problem,
    launches,
    linear_problem,
    precision_now,
    rows_as_images,
    spec_of,
)
from kfac_ext.ops._library import check_flag, check_floating, check_weights, define, native_device
from kfac_ext.ops._schedules import Schedules

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


@remembered
def _ints_of(kind: int, geometry: ConvGeometry | None, groups: int, bias: bool, reduce: bool) -> tuple[int, ...]:
    if geometry is None:
        call = _Call(kind, groups=groups, bias=bias, reduce=reduce)
    else:  # by its constructor: torch.compile of torch 2.6 cannot trace _replace
        g = geometry
        call = _Call(kind, g.kernel_size, g.stride, g.padding, g.dilation, groups, bias, reduce)
    return tuple(call.to_ints())


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
        check_floating(_OPERATION, "x", x)
        check_flag(_OPERATION, "bias", bias)
        check_weights(_OPERATION, decay, scale)
        return CovarianceUpdate(key, x, _ints_of(_LINEAR, None, 1, bias, False), decay, scale)

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
        check_flag(_OPERATION, "bias", bias)
        check_weights(_OPERATION, decay, scale)
        g = single._geometry(x, kernel_size, stride, padding, dilation, groups)
        return CovarianceUpdate(key, x, _ints_of(_CONV, g, groups, bias, reduce), decay, scale)

    @staticmethod
    def gradient(
        key: str, g: Tensor, *, groups: int = 1, mode: str = "expand", decay: float = 0.0, scale: float = 1.0
    ) -> CovarianceUpdate:
        """Of the output gradients g [N, O] or [N, O, H, W]; the arguments of `kfac_ext.gradient_covariance`."""
        check_floating(_OPERATION, "g", g)
        single._gradient_size(g, groups)
        check_weights(_OPERATION, decay, scale)
        reduce = single._reduces(_OPERATION, mode)
        return CovarianceUpdate(key, g, _ints_of(_GRADIENT, None, groups, False, reduce), decay, scale)


class _Entry(NamedTuple):
    call: _Call
    out: Tensor
    x: Tensor
    decay: float
    scale: float

    def check(self) -> None:
        if self.call.kind not in (_LINEAR, _CONV, _GRADIENT):
            raise ValueError(f"{_OPERATION}: calls has a kind {self.call.kind}, expected 0, 1 or 2")
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


def _check_lists(
    outs: list[Tensor], xs: list[Tensor], calls: Sequence[int], decays: list[float], scales: list[float]
) -> None:
    """What no plan knows of: whether there is one of everything for each out, and the weights."""
    count = len(outs)
    for name, given, wanted in (
        ("xs", xs, count),
        ("calls", calls, count * _CALL_INTS),
        ("decays", decays, count),
        ("scales", scales, count),
    ):
        if len(given) != wanted:
            raise ValueError(f"{_OPERATION}: {name} has {len(given)} entries, expected {wanted} for {count} outs")
    if not math.isfinite(sum(decays) + sum(scales)):
        for decay, scale in zip(decays, scales):
            check_weights(_OPERATION, decay, scale)


def _entries(
    outs: list[Tensor], xs: list[Tensor], calls: Sequence[int], decays: list[float], scales: list[float]
) -> list[_Entry]:
    _check_lists(outs, xs, calls, decays, scales)
    starts = range(0, len(calls), _CALL_INTS)
    ints = [calls[start : start + _CALL_INTS] for start in starts]
    entries = [_Entry(_Call.from_ints(c), *rest) for c, rest in zip(ints, zip(outs, xs, decays, scales))]
    for entry in entries:  # all of them before the first changes anything
        entry.check()
    return entries


class _Plan(NamedTuple):
    """How updates of these shapes are computed: what of it is the same in every call.

    Attributes:
        rounds: one after the other; launches, and updates that run alone, by their places in the lists.
        calls: of the updates.
        weights: by which their scales are multiplied, as kernels sum where a covariance averages.
        copied: updates of rows that no strides describe, which are copied first.
    """

    rounds: list[Launch | int]
    calls: list[_Call]
    weights: list[float]
    copied: list[int]

    def run(
        self, outs: list[Tensor], xs: list[Tensor], places: list[int], decays: list[float], scales: list[float]
    ) -> None:
        """Compute updates; `places` are the addresses of the outs."""
        rows = {i: rows_as_images(xs[i])[0] for i in self.copied}
        images = [x.data_ptr() for x in xs]
        for i, copy in rows.items():
            images[i] = copy.data_ptr()
        weighted = [scale * weight for scale, weight in zip(scales, self.weights)]
        for part in self.rounds:
            if isinstance(part, Launch):
                part.run(images, places, decays, weighted)
            else:
                _Entry(self.calls[part], outs[part], xs[part], decays[part], scales[part]).run_alone()


def _make_plan(device: torch.device, key: _Key, outs: list[Tensor], xs: list[Tensor], places: list[int]) -> _Plan:
    entries = _entries(outs, xs, key.calls, [0.0] * len(xs), [1.0] * len(xs))
    problems = [entry.problem() for entry in entries]
    specs = [spec_of(problem, key.precision) for problem in problems]
    served = dict(key.served)
    plan = _Plan([], [entry.call for entry in entries], [problem.scale for problem in problems], [])
    waiting: dict[int, int] = {}  # by the address of the out

    def flush() -> None:
        if waiting:
            plan.rounds.extend(launches(device, specs, tuple(waiting.values())))
            waiting.clear()

    for i, (entry, problem) in enumerate(zip(entries, problems)):
        # a launch writes its outs in no order: what goes into the same one again waits for the next
        if places[i] in waiting:
            flush()
        if not (served[entry.x.dtype] and fits_cuda(problem)):
            plan.rounds.append(i)
            continue
        waiting[places[i]] = i
        if problem.image.data_ptr() != entry.x.data_ptr():
            plan.copied.append(i)
    flush()
    return plan


class _Key(NamedTuple):
    """All that decides how a list of updates is computed.

    Attributes:
        calls: their ints.
        tensors: shape, strides, dtype of every input and of every out with its device.
        served: which dtypes of inputs have kernels here.
        repeated: for every update the first of the same out, where one comes twice.
        precision: a kfac::Precision.
    """

    calls: tuple[int, ...]
    tensors: tuple[Any, ...]
    served: tuple[tuple[torch.dtype, bool], ...]
    repeated: tuple[int, ...]
    precision: int


_plans = Schedules(_make_plan, lambda plan: [part.descriptors for part in plan.rounds if isinstance(part, Launch)])


def _seen(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """What decides how they are read."""
    try:
        return [(t.shape, t.stride(), t.dtype) for t in tensors]
    except RuntimeError:  # those of another layout have no strides; checks refuse them by name
        return [(t.shape, t.layout, t.dtype) for t in tensors]


def _group(outs: list[Tensor], xs: list[Tensor], calls: list[int], decays: list[float], scales: list[float]) -> None:
    _check_lists(outs, xs, calls, decays, scales)
    devices = {x.device for x in xs}
    if len(devices) == 1:
        _group_on(xs[0].device, outs, xs, calls, decays, scales)
        return
    _entries(outs, xs, calls, decays, scales)  # refuses before anything is changed
    for device in devices:
        members = [i for i, x in enumerate(xs) if x.device == device]
        own = [value for i in members for value in calls[i * _CALL_INTS : (i + 1) * _CALL_INTS]]
        of_outs, of_xs = ([values[i] for i in members] for values in (outs, xs))
        _group_on(device, of_outs, of_xs, own, *([values[i] for i in members] for values in (decays, scales)))


def _group_on(
    device: torch.device,
    outs: list[Tensor],
    xs: list[Tensor],
    calls: list[int],
    decays: list[float],
    scales: list[float],
) -> None:
    served: dict[torch.dtype, bool] = {}
    for x in xs:
        if x.dtype not in served:
            served[x.dtype] = _joins_group(x)
    places = [out.data_ptr() for out in outs]
    firsts: dict[int, int] = {}
    repeated = [firsts.setdefault(place, i) for i, place in enumerate(places)] if len({*places}) < len(xs) else ()
    key = _Key(
        tuple(calls),
        (*_seen(xs), *_seen(outs), *{out.device for out in outs}),
        tuple(served.items()),
        tuple(repeated),
        precision_now(),
    )
    _plans(device, key, outs, xs, places).run(outs, xs, places, decays, scales)


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
        [update.x.detach() if update.x.requires_grad else update.x for update in updates],
        [value for update in updates for value in update.call],
        [float(update.decay) for update in updates],
        [float(update.scale) for update in updates],
    )
