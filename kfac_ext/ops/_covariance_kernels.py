"""Covariance kernels, called on problems that are already checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_ext import _C, reference
from kfac_ext.geometry import ConvGeometry, conv_geometry
from kfac_ext.ops._cuda import register_family, worst
from kfac_ext.ops._launch import descriptors_on, stream_of, tf32_allowed, workspace_on
from kfac_ext.ops._library import DTYPE_CODES
from kfac_ext.ops._schedules import Schedules

_AUTO = 0  # kfac::CovarianceAlgorithm::kAuto

_WORKSPACE_BYTES = 1 << 30  # a group that would need more is cut in two

# kernel 1 x 1, stride 1, no padding, dilation 1
_POINT = (1, 1, 1, 1, 0, 0, 1, 1)


class Problem(NamedTuple):
    """out <- decay out + scale sum over samples and positions of a a^T, for images seen by one convolution."""

    image: Tensor
    """[N, C, H, W]"""
    shape: tuple[int, ...]
    """N, C, H, W, kernel, stride, padding (top, left), dilation, output size, groups"""
    reduce: bool
    """average the patches of a sample first"""
    bias: bool
    decay: float
    scale: float
    out: Tensor


def conv_shape(x: Tensor, geometry: ConvGeometry) -> tuple[int, ...]:
    """The shape of a `Problem` whose image is x."""
    left, _, top, _ = geometry.padding
    place = (*geometry.kernel_size, *geometry.stride, top, left, *geometry.dilation)
    return (*x.shape, *place, *geometry.output_size, geometry.groups)


def rows_as_images(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The rows of x [..., d] as images of one pixel, and their shape as that of a `Problem`."""
    rows = x.reshape(-1, x.shape[-1], 1, 1)
    return rows, (*rows.shape, *_POINT, 1, 1, 1)


def linear_problem(x: Tensor, out: Tensor, bias: bool, decay: float, scale: float) -> Problem:
    """The rows of x [..., d]."""
    rows, shape = rows_as_images(x)
    return Problem(rows, shape, False, bias, decay, scale / rows.shape[0], out)


def conv_problem(
    x: Tensor, out: Tensor, geometry: ConvGeometry, bias: bool, reduce: bool, decay: float, scale: float
) -> Problem:
    """The patches of x."""
    positions = 1 if reduce else geometry.output_size[0] * geometry.output_size[1]
    return Problem(x, conv_shape(x, geometry), reduce, bias, decay, scale / (x.shape[0] * positions), out)


def gradient_problem(g: Tensor, out: Tensor, groups: int, reduce: bool, decay: float, scale: float) -> Problem:
    """The pixels of g as patches of a 1 x 1 convolution; `reduce` sums them where the kernels would average."""
    image = g[:, :, None, None] if g.dim() == 2 else g
    height, width = image.shape[2:]
    weight = (height * width) ** 2 if reduce else 1
    shape = (*image.shape, *_POINT, height, width, groups)
    return Problem(image, shape, reduce, False, decay, scale * weight / g.shape[0], out)


def run_cpu(problem: Problem) -> None:
    """Compute one problem on the CPU."""
    x = problem.image
    _C.covariance_cpu(
        x.data_ptr(),
        DTYPE_CODES[x.dtype],
        list(x.stride()),
        list(problem.shape),
        problem.reduce,
        _AUTO,
        problem.bias,
        problem.decay,
        problem.scale,
        problem.out.data_ptr(),
        torch.get_num_threads(),
    )


# ---- CUDA ----

Spec = tuple[int, tuple[int, ...], tuple[int, ...], bool, int, bool, int]


class Launch(NamedTuple):
    """Some problems of a list, in one launch of each kernel."""

    members: Sequence[int]
    """their places in the list"""
    group: _C.CovarianceGroup
    descriptors: Tensor

    def run(self, images: Sequence[int], outs: Sequence[int], decays: Sequence[float], scales: Sequence[float]) -> None:
        """Compute them on the current stream; pointers and weights are those of the whole list."""
        device, members = self.descriptors.device, self.members
        workspace = workspace_on(device, self.group.workspace_bytes)
        _C.covariance_cuda(
            self.group,
            self.descriptors.data_ptr(),
            workspace.data_ptr(),
            [images[i] for i in members],
            [outs[i] for i in members],
            [decays[i] for i in members],
            [scales[i] for i in members],
            device.index or 0,
            stream_of(device),
        )


def precision_now() -> int:
    """kfac::Precision: as exact as a float32 matmul, or tf32 where PyTorch may use it."""
    return int(tf32_allowed())


def spec_of(problem: Problem, precision: int) -> Spec:
    """What of a problem decides how it is computed."""
    x = problem.image
    return DTYPE_CODES[x.dtype], x.stride(), problem.shape, problem.reduce, _AUTO, problem.bias, precision


def launches(
    device: torch.device, specs: Sequence[Spec], members: Sequence[int], *least_wide_tiles: int
) -> Iterator[Launch]:
    """These members of a list of problems, no two with the same out, in as few launches as can be.

    `least_wide_tiles`: fewer than that are none; left out, as pays.
    """
    fits = len(members) <= _C.max_group_layers
    group = _C.CovarianceGroup([specs[i] for i in members], *least_wide_tiles) if fits else None
    if group is None or (group.workspace_bytes > _WORKSPACE_BYTES and len(members) > 1):
        middle = len(members) // 2
        yield from launches(device, specs, members[:middle], *least_wide_tiles)
        yield from launches(device, specs, members[middle:], *least_wide_tiles)
    else:
        yield Launch(members, group, descriptors_on(device, "covariance", group.descriptors()))


_schedules = Schedules(
    lambda device, specs: list(launches(device, specs, range(len(specs)))),
    lambda found: [launch.descriptors for launch in found],
)
"""By the shapes of a list of problems."""


def run_cuda(problems: Sequence[Problem]) -> None:
    """Compute problems of one device, no two with the same out, in a few launches on its current stream."""
    precision = precision_now()
    _run(problems, _schedules(problems[0].image.device, tuple(spec_of(problem, precision) for problem in problems)))


def _run(problems: Sequence[Problem], found: Iterable[Launch]) -> None:
    images, outs = [p.image.data_ptr() for p in problems], [p.out.data_ptr() for p in problems]
    decays, scales = [p.decay for p in problems], [p.scale for p in problems]
    for launch in found:
        launch.run(images, outs, decays, scales)


_MAX_ROWS = 2**31 - 1  # rows are numbered in 32 bits


def fits_cuda(problem: Problem) -> bool:
    """Whether the CUDA kernels can number the rows of this problem."""
    return rows_fit(problem.shape)


def rows_fit(shape: tuple[int, ...]) -> bool:
    """Whether pixels and output positions of all samples can be numbered."""
    n, _, height, width, *_, out_h, out_w, _ = shape
    return n * max(height * width, out_h * out_w) <= _MAX_ROWS


# ---- the kernels' own check ----

# of products as exact as float32's and of tf32 inputs, on some hundred rows: a lost product of the split would be 1e-4
_ALLOWED = (2e-6, 1e-3)


def _allowed(problem: Problem, precision: int) -> float:
    """Products of halves are exact, whatever the precision; their averages are no halves."""
    exact = problem.image.dtype != torch.float32 and not problem.reduce
    return _ALLOWED[0 if exact else precision]


def _check(device: torch.device) -> float:
    """Every way through the kernels, all in one launch of each precision; as a multiple of what is allowed.

    With tf32 by wide tiles, however few; halves go both ways.
    """
    cases = _cases(device)
    found = []
    for precision in range(len(_ALLOWED)):
        outs = [torch.full_like(exact, torch.nan, dtype=torch.float32) for exact, _ in cases]
        problems = [problem(out) for out, (_, problem) in zip(outs, cases)]
        specs = [spec_of(problem, precision) for problem in problems]
        _run(problems, launches(device, specs, range(len(specs)), *([0] if precision else [])))
        shares = [
            (out - exact).norm() / exact.norm() / _allowed(problem, precision)
            for out, (exact, _), problem in zip(outs, cases, problems)
        ]
        found.append(worst([torch.stack(shares).nan_to_num(nan=torch.inf).max()], 1.0))
    return max(found)


def _cases(device: torch.device) -> list[tuple[Tensor, Callable[[Tensor], Problem]]]:
    """Covariances in float64, and for each how to have it computed into a tensor."""
    steps = torch.arange(3 * 140 * 7 * 6, dtype=torch.float64, device=device)
    image = torch.sin(steps * steps / 7).float().view(3, 140, 7, 6)  # columns: tiles of 128 and what is left
    rows = image.flatten()[: 45 * 50].view(45, 50)
    place = {"kernel_size": 3, "padding": 1}
    convolutions: list[tuple[Tensor, dict[str, Any]]] = [
        (image, {"kernel_size": 1}),
        (image[:, :20], {**place, "bias": True}),
        (image[:, :20].contiguous(memory_format=torch.channels_last), place),
        (image[:, :40].bfloat16(), {**place, "stride": 2}),
        (image[:, :140, :2, :2].half(), {"kernel_size": 2}),
        (image[:, :20].half(), {**place, "bias": True}),
        (image.bfloat16(), {"kernel_size": 1, "bias": True}),
        (image[:, :16].half(), {**place, "groups": 16, "bias": True}),
        (image[:, :12].bfloat16(), {**place, "groups": 2, "mode": "reduce"}),
        (image[:, :12], {**place, "mode": "reduce", "bias": True}),
        (image[:, :16], {**place, "groups": 16, "bias": True}),
        (image[:, :24], {**place, "groups": 2}),
    ]
    cases = [_conv_case(x, **options) for x, options in convolutions]
    exact = reference.linear_covariance(rows.double(), bias=True)
    return [*cases, (exact, lambda out: linear_problem(rows, out, True, 0.0, 1.0))]


def _conv_case(
    x: Tensor,
    kernel_size: int,
    padding: int = 0,
    stride: int = 1,
    groups: int = 1,
    bias: bool = False,
    mode: str = "expand",
) -> tuple[Tensor, Callable[[Tensor], Problem]]:
    geometry = conv_geometry(x.shape, kernel_size, stride, padding, 1, groups)
    place: dict[str, Any] = {"stride": stride, "padding": padding, "groups": groups, "bias": bias, "mode": mode}
    exact = reference.conv2d_covariance(x.double(), kernel_size, **place)
    return exact, lambda out: conv_problem(x, out, geometry, bias, mode == "reduce", 0.0, 1.0)


register_family("covariance", frozenset({torch.float32, torch.bfloat16, torch.float16}), _check)
