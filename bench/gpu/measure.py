"""Timing on a GPU (or, to try it, on the CPU): the device's stopwatch, precisions, what the device reaches at best."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from bench.gpu.names import PRECISIONS, RATES
from bench.machine import copy_gbs, matmul_gflops
from bench.timing import Alternation, Samples, Stopwatch, Variant, figures, wall_and_cpu

_MOST_KERNELS = 16


def stopwatch(device: torch.device) -> Stopwatch:
    """Between device events, with a cold second-level cache; on the CPU its own."""
    if device.type == "cpu":
        return wall_and_cpu()
    flush = torch.empty(128 << 20, dtype=torch.uint8, device=device)

    def events(call: Variant, repeats: int) -> tuple[float, None]:
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end) / repeats, None

    return events


def alternate(variants: Mapping[str, Variant], device: torch.device, rounds: int, seconds: float) -> dict[str, Samples]:
    """Each variant, taking turns; fewer rounds after so many seconds."""
    alternation = Alternation(variants, stopwatch=stopwatch(device))
    alternation.rounds(rounds, seconds)
    return alternation.samples


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Float32 or tf32 products, in matmul and convolutions (and so in kfac_ext)."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest" if name == "float32" else "high")
    torch.backends.cudnn.allow_tf32 = name != "float32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def kernel_times(call: Variant, calls: int = 3) -> dict[str, float]:
    """Seconds on the device of each kernel (or copy) of one call, by name, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    times = {event.key: 1e-6 * event.self_device_time_total / calls for event in profile.key_averages()}
    return {name: times[name] for name in sorted(times, key=lambda name: -times[name])[:_MOST_KERNELS]}


def replayed(call: Variant) -> float | str:
    """Seconds of the call as a replayed CUDA graph, without the host's part; or why it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except Exception as error:  # whatever a call does that a graph cannot hold
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return _alone(torch.device("cuda", 0), 10, 1.0)(graph.replay)["median"]


def ceilings(device: torch.device, quick: bool) -> dict[str, float]:
    """What this device reaches, named as a CPU's: copying, matmul in float32 and in the other precisions."""
    n, count = (256, 1 << 16) if quick else (8192, 1 << 29)
    measured = _alone(device, 5, 10.0)

    def best(call: Variant) -> float:
        return measured(call)["min"]

    found = {"copy_gbs": copy_gbs(best, str(device), count)}
    for name in PRECISIONS:
        with precision(name):
            found[RATES[name]] = matmul_gflops(best, str(device), n)
    return found


def _alone(device: torch.device, rounds: int, seconds: float) -> Callable[[Variant], dict[str, float]]:
    return lambda call: figures(alternate({"": call}, device, rounds, seconds)[""].wall)
