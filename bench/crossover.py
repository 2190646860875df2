"""Measure where multiplying shifted images beats gathering patches, and fit the rule that chooses between them.

    python -m bench.crossover [--threads 1] [--out bench/results/crossover-<cpu>-<simd>-1t.json]
    python -m bench.crossover --fit bench/results/crossover-<cpu>-<simd>-1t.json

For each shape: time of both algorithms, their ratio, the ratio that the rule's cost model predicts, and the time lost
where the rule picks the slower one. --fit measures nothing: from a result it computes the weights of the cost model
(least squares of the relative errors, rounded) and says whether they are those that are built in for its instruction
set (`kWideWeights`, `kNarrowWeights` in csrc/include/kfac/covariance.h); exit code 1 if not.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import nnls

from bench.machine import machine, machine_slug
from bench.results import RESULTS
from kfac_ext import _C

SHIFT, PATCHES = 1, 2
KERNELS = [(3, 1), (3, 2), (5, 1), (7, 2), (2, 2)]  # kernel size, stride
SIZES = [2, 4, 8, 16, 32]
CHANNELS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64]
ROUNDS = 7
MIN_SAMPLE = 1e-3  # seconds: shorter calls are repeated within one sample
Row = Mapping[str, Any]


class Weights(NamedTuple):
    """What each kind of work of the two algorithms takes, in units of shift's first."""

    shift: list[float]
    patches: list[float]


BUILT_IN = {simd: Weights(*map(list, weights)) for simd, weights in _C.covariance_weights.items()}


def built_in(simd: str) -> Weights:
    """The weights in use with an instruction set: AVX-512 has its own, all others share those of AVX2."""
    return BUILT_IN["avx512" if simd == "avx512" else "avx2"]


def shape_of(image: Sequence[int], kernel: int, stride: int) -> list[int]:
    """The numbers that the kernels take for images [N, C, H, W] and a square kernel, padded by half of it."""
    padding = kernel // 2
    out = [(size + 2 * padding - kernel) // stride + 1 for size in image[2:]]
    return [*image, kernel, kernel, stride, stride, padding, padding, 1, 1, *out, 1]


# ---- measuring ----


def sample(x: torch.Tensor, shape: list[int], out: torch.Tensor, algorithm: int, threads: int, repeats: int) -> float:
    """Seconds of a call; of one thread its CPU time, which does not count what else the machine does."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    start = clock()
    for _ in range(repeats):
        _C.covariance_cpu(
            x.data_ptr(), 0, list(x.stride()), shape, False, algorithm, False, 0.0, 1.0, out.data_ptr(), threads
        )
    return (clock() - start) / repeats


def measure(image: Sequence[int], kernel: int, stride: int, threads: int) -> dict[str, Any]:
    """Median milliseconds of both algorithms, one after the other in every round."""
    x, shape = torch.randn(*image), shape_of(image, kernel, stride)
    out = torch.zeros(image[1] * kernel * kernel, image[1] * kernel * kernel)
    times: dict[int, list[float]] = {SHIFT: [], PATCHES: []}
    repeats = {}
    for algorithm in times:
        first = min(sample(x, shape, out, algorithm, threads, 1) for _ in range(2))
        repeats[algorithm] = max(1, math.ceil(MIN_SAMPLE / max(first, 1e-7)))
    for _ in range(ROUNDS):
        for algorithm, values in times.items():
            values.append(sample(x, shape, out, algorithm, threads, repeats[algorithm]))
    shift, patches = (float(f"{1e3 * statistics.median(times[a]):.4g}") for a in (SHIFT, PATCHES))
    return {"image": list(image), "kernel": kernel, "stride": stride, "shift_ms": shift, "patches_ms": patches}


# ---- the rule ----


def fit(rows: Sequence[Row]) -> Weights:
    """The weights, none negative, that predict the measured times with the least squares of relative errors.

    Rounded to two digits.
    """
    solved = []
    for i, key in enumerate(("shift_ms", "patches_ms")):
        times = np.array([row[key] for row in rows])
        work = np.array([_C.covariance_work(_shape(row))[i] for row in rows])
        solved.append(nnls(work / times[:, None], np.ones(len(rows)))[0])
    unit = solved[0][0]
    return Weights(*([float(f"{value / unit:.2g}") for value in values] for values in solved))


def judge(rows: Sequence[Row], weights: Weights) -> Iterator[tuple[float, float, float]]:
    """For each row: patches / shift as measured and as predicted, and the part of the time lost by a wrong choice."""
    for row in rows:
        times = row["shift_ms"], row["patches_ms"]
        costs = [sum(map(lambda a, b: a * b, *pair)) for pair in zip(_C.covariance_work(_shape(row)), weights)]
        chosen = times[0] if costs[0] <= costs[1] else times[1]
        yield times[1] / times[0], costs[1] / costs[0], chosen / min(times) - 1


def always(rows: Sequence[Row], key: str) -> float:
    """The mean part of the time that is lost by one algorithm for all, that of "shift_ms" or "patches_ms"."""
    return statistics.fmean(row[key] / min(row["shift_ms"], row["patches_ms"]) - 1 for row in rows)


def verdict(rows: Sequence[Row], weights: Weights) -> str:
    """How often the rule is right, and what one algorithm for all would lose."""
    lost = [value for _, _, value in judge(rows, weights)]
    return (
        f"rule right in {sum(value == 0 for value in lost)} of {len(lost)} shapes, mean time lost "
        f"{statistics.fmean(lost):.1%} (by shifts always {always(rows, 'shift_ms'):.0%}, by patches always "
        f"{always(rows, 'patches_ms'):.0%})"
    )


def _shape(row: Row) -> list[int]:
    return shape_of(row["image"], row["kernel"], row["stride"])


# ---- the command ----


def write(path: Path, document: Mapping[str, Any]) -> None:
    """JSON with one line a shape."""
    head = json.dumps({key: value for key, value in document.items() if key != "rows"}, indent=1).removesuffix("\n}")
    rows = ",\n".join(json.dumps(row) for row in document["rows"])
    path.write_text(f'{head},\n "rows": [\n{rows}\n ]\n}}\n')


def run(samples: int, threads: int) -> dict[str, Any]:
    """Measure every shape and print a line for each."""
    rows = []
    weights = built_in(machine()["simd"])
    print("kernel stride  size channels  shift ms  patches ms  ratio  predicted  lost")
    for kernel, stride in KERNELS:
        for size in SIZES:
            for channels in CHANNELS:
                row = measure((samples, channels, size, size), kernel, stride, threads)
                ((ratio, predicted, lost),) = judge([row], weights)
                rows.append(row)
                print(
                    f"{kernel:6} {stride:6} {size:5} {channels:8} {row['shift_ms']:9.3f} {row['patches_ms']:11.3f}"
                    f" {ratio:6.2f} {predicted:10.2f} {lost:5.0%}",
                    flush=True,
                )
    return {"machine": machine(), "threads": threads, "rows": rows}


def main() -> int:
    """Measure, or fit what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="default: bench/results/crossover-<cpu>-<simd>-<threads>t.json")
    parser.add_argument("--fit", type=Path, metavar="FILE", help="fit the rule to this result instead of measuring")
    arguments = parser.parse_args()
    if arguments.fit:
        document = json.loads(arguments.fit.read_text())
    else:
        document = run(arguments.samples, arguments.threads)
        name = f"crossover-{machine_slug()}-{arguments.threads}t.json"
        out = arguments.out or RESULTS / name
        write(out, document)
        print(f"written: {out}")
    weights, fitted = built_in(document["machine"]["simd"]), fit(document["rows"])
    print(verdict(document["rows"], weights))
    print(f"fit: {fitted}\nbuilt in: {weights}")
    return int(bool(arguments.fit) and fitted != weights)


if __name__ == "__main__":
    sys.exit(main())
