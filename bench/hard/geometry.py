"""Convolutions of huge numbers: right where they can be computed, an error that says what is too large elsewhere."""

import random
import resource
from typing import Any

import torch
from torch import Tensor

import kfac_ext
from bench.hard.batches import Found, run_forked
from bench.hard.tally import Tally

SIZES = {"quick": 3000, "full": 50_000}

_MEMORY = 1 << 27  # bytes that a case may take beside what is taken
_FEW = 4096  # numbers that the oracle gathers


def run(cases: int, seed: int, seconds: float, first: int = 0) -> Tally:
    """A result that differs from a sum over gathered pixels is wrong."""
    return run_forked("geometry", _case, cases, seed, seconds, first=first)


def _case(seed: int, index: int) -> Found:
    rng = random.Random(f"geometry {seed} {index}")
    torch.manual_seed(rng.getrandbits(60))
    torch.set_num_threads(rng.choice((1, 2)))
    _limit_memory()
    axes = [_axis(rng), _axis(rng)]
    x = torch.randn(rng.randint(1, 3), rng.choice((1, 2, 3, 17)), axes[0]["size"], axes[1]["size"])
    x = x.to(rng.choice((torch.float32, torch.float64)))
    place = {key: [axis[key] for axis in axes] for key in ("kernel_size", "stride", "dilation")}
    before, after = ([axis[key] for axis in axes] for key in ("before", "after"))
    padding = [before[1], after[1], before[0], after[0]]
    few = all(_outputs(axis) <= _FEW for axis in axes)  # power iteration goes through all
    name, result = rng.choice(("expand", "reduce", "depthwise", "raw", *["power"] * few)), None
    shown = f"{name} of {list(x.shape)} {x.dtype}, {place}, padding {padding}"
    try:
        result = _computed(name, x, place, padding)
    except (ValueError, MemoryError, RuntimeError, OverflowError) as error:
        known = ("padding", "stride", "dilation", "kernel_size", "memory", "allocate", "patch", "out")
        return [] if any(word in str(error) for word in known) else [("unclear", f"{shown}: {error}")]
    return [("wrong", f"{shown}: {text}") for text in _wrong(name, x, place, padding, result)]


def _limit_memory() -> None:
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + _MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _huge(rng: random.Random, most: int = 70) -> int:
    return max(1, (1 << rng.randint(1, most)) + rng.choice((-1, 0, 1)))


def _axis(rng: random.Random) -> dict[str, int]:
    """Numbers of one axis, some of them huge, half the time such that there are few outputs."""
    most = rng.choice((3, 10, 20, 31, 40, 63, 66))
    size, kernel = rng.randint(1, 6), rng.randint(1, 4)
    dilation = rng.choice((1, 2, _huge(rng, most)))
    reach = (kernel - 1) * dilation + 1
    pads = rng.choice((0, 1, max(0, reach - size), max(0, reach - size) // 2 + 1, _huge(rng, most)))
    before, after = pads, rng.choice((pads, 0, pads + 1))
    while before + size + after < reach:
        before, after = before + (reach - size) // 2 + 1, after + (reach - size) // 2 + 1
    room = before + size + after - reach
    stride = rng.choice((1, 2, _huge(rng, most), max(1, room // 2), max(1, room), room + 1))
    return {
        "size": size,
        "kernel_size": kernel,
        "stride": stride,
        "dilation": dilation,
        "before": before,
        "after": after,
    }


def _outputs(axis: dict[str, int]) -> int:
    room = axis["before"] + axis["size"] + axis["after"] - (axis["kernel_size"] - 1) * axis["dilation"] - 1
    return room // axis["stride"] + 1


def _computed(name: str, x: Tensor, place: dict[str, Any], padding: list[int]) -> Tensor:
    taps = place["kernel_size"][0] * place["kernel_size"][1]
    groups = x.shape[1] if name == "depthwise" else 1
    if name == "raw" or padding[0] != padding[1] or padding[2] != padding[3]:
        d = x.shape[1] // groups * taps + 1
        out = x.new_zeros((groups, d, d) if groups > 1 else (d, d))
        steps = (place["kernel_size"], place["stride"], padding, place["dilation"], groups)
        if name == "power":
            vector = x.new_ones(d)
            values, *_ = torch.ops.kfac_ext.covariance_power_iteration_(
                vector, x, place["kernel_size"], place["stride"], padding, place["dilation"], True, 0.0, 1
            )
            return torch.cat([values, vector])
        torch.ops.kfac_ext.conv2d_covariance_(out, x, *steps, True, name == "reduce", 0.0, 1.0)
        return out
    given = {**place, "padding": (padding[2], padding[0]), "bias": True}
    if name == "power":
        start = x.new_ones(x.shape[1] * taps + 1)
        found = kfac_ext.covariance_power_iteration(x, vector=start, **given, tol=0.0, max_iter=1)
        return torch.cat([found.eigenvalues, found.eigenvectors[0]])
    mode = "reduce" if name == "reduce" else "expand"
    return kfac_ext.conv2d_covariance(x, **given, groups=groups, mode=mode)


def _wrong(name: str, x: Tensor, place: dict[str, Any], padding: list[int], result: Tensor) -> list[str]:
    if not bool(result.isfinite().all()):
        return ["the result is not finite"]
    patches = _patches(x, place, padding)
    if patches is None:
        return []
    wanted = _wanted(name, patches, x.shape[1])
    error = float((result.double() - wanted).abs().max())
    allowed = (1e-5 if x.dtype == torch.float32 else 1e-12) * (1 + float(x.double().square().sum()))
    return [] if error <= allowed else [f"off by {error:.3g}, allowed {allowed:.3g}"]


def _wanted(name: str, patches: Tensor, channels: int) -> Tensor:
    """From patches [N, S, C, taps]."""
    if name == "depthwise" and channels > 1:
        rows = patches.flatten(0, 1).transpose(0, 1)  # [C, N S, taps]
    else:
        rows = patches.flatten(2)
        rows = (rows.mean(dim=1) if name == "reduce" else rows.flatten(0, 1))[None]
    rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], dim=2)
    A = rows.mT @ rows / rows.shape[1]
    A = A if len(A) > 1 else A[0]
    if name != "power":
        return A
    unit = torch.ones(len(A), dtype=A.dtype) / len(A) ** 0.5
    image = A @ unit
    return torch.cat([(unit @ image)[None], image / image.norm()])


def _patches(x: Tensor, place: dict[str, Any], padding: list[int]) -> Tensor | None:
    """[N, S, C, taps], gathered pixel by pixel; None where there are too many positions."""
    sites = []
    for size, kernel, stride, dilation, before, after in zip(
        x.shape[2:], *(place[key] for key in ("kernel_size", "stride", "dilation")), padding[2::-2], padding[3::-2]
    ):
        outputs = (size + before + after - (kernel - 1) * dilation - 1) // stride + 1
        if outputs * kernel > _FEW:
            return None
        sites.append([[o * stride + k * dilation - before for k in range(kernel)] for o in range(outputs)])
    if len(sites[0]) * len(sites[1]) * len(sites[0][0]) * len(sites[1][0]) > _FEW:
        return None
    n, c, height, width = x.shape
    wide = torch.zeros(n, c, height + 1, width + 1, dtype=torch.float64)  # the last row and column: what is no pixel
    wide[:, :, :height, :width] = x.double()
    rows, columns = (
        torch.tensor([[s if 0 <= s < size else size for s in taps] for taps in axis])
        for axis, size in zip(sites, (height, width))
    )
    found = wide[:, :, rows[:, None, :, None], columns[None, :, None, :]]  # [N, C, oh, ow, kh, kw]
    return found.permute(0, 2, 3, 1, 4, 5).reshape(n, -1, c, rows.shape[1] * columns.shape[1])
