"""Timing on a GPU (or, to try it, on the CPU): variants taking turns, precisions, what the device reaches at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from bench.gpu.names import PRECISIONS

Variant = Callable[[], object]

_FEWEST_ROUNDS, _MOST_KERNELS = 3, 16


def timer(device: torch.device) -> Callable[[Variant], float]:
    """milliseconds(call): between device events with a cold second-level cache, or wall time on the CPU."""
    if device.type == "cpu":

        def wall(call: Variant) -> float:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)

        return wall
    flush = torch.empty(128 << 20, dtype=torch.uint8, device=device)

    def events(call: Variant) -> float:
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return events


def alternate(
    variants: Mapping[str, Variant], device: torch.device, rounds: int, seconds: float
) -> dict[str, dict[str, float]]:
    """Milliseconds of each variant, taking turns: median, quartiles, minimum, rounds (fewer after so many seconds)."""
    once, end = timer(device), time.monotonic() + seconds
    times: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        call()
        call()
    for done in range(rounds):
        if done >= _FEWEST_ROUNDS and time.monotonic() > end:
            break
        for name, call in variants.items():
            times[name].append(once(call))
    found = {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        found[name] = {"median": median, "q1": low, "q3": high, "min": min(values), "rounds": len(values)}
    return found


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
    """Milliseconds on the device of each kernel (or copy) of one call, by name, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    times = {event.key: event.self_device_time_total / 1e3 / calls for event in profile.key_averages()}
    return {name: times[name] for name in sorted(times, key=lambda name: -times[name])[:_MOST_KERNELS]}


def replayed(call: Variant) -> float | str:
    """Milliseconds of the call as a replayed CUDA graph, without the host's part; or why it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except Exception as error:  # whatever a call does that a graph cannot hold
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return alternate({"": graph.replay}, torch.device("cuda", 0), 10, 1.0)[""]["median"]


def ceilings(device: torch.device, quick: bool) -> dict[str, float]:
    """What this device reaches: copying in GB/s (read + written), matmul in TFLOP/s."""
    n, count = (256, 1 << 16) if quick else (8192, 1 << 29)
    source = torch.randn(count, device=device)
    target, a = torch.empty_like(source), torch.randn(n, n, device=device)

    def best(call: Variant) -> float:
        return alternate({"": call}, device, 5, 10)[""]["min"]

    found = {"copy_gbs": 2e-6 * source.nbytes / best(lambda: target.copy_(source))}
    for name in PRECISIONS:
        with precision(name):
            found[f"matmul_{name}_tflops"] = 2e-9 * n**3 / best(lambda: a @ a)
    return found
