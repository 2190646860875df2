"""Measure where multiplying shifted images beats gathering patches, and how well the built-in rule predicts it.

    python bench/crossover.py [--threads 1] [--out results.json]

For each shape: time of both algorithms, their ratio, the ratio that the rule's cost model predicts, and the time lost
where the rule picks the slower one. The constants of the model (csrc/cpu/covariance.cpp) were fitted to this table.
"""

import argparse
import json
import statistics
import time

import torch

from kfac_ext import _C

SHIFT, PATCHES = 1, 2
KERNELS = [(3, 1), (3, 2), (5, 1), (7, 2), (2, 2)]  # kernel size, stride
SIZES = [2, 4, 8, 16, 32]
CHANNELS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64]


def shape_of(x, kernel, stride):
    padding = kernel // 2
    out = [(size + 2 * padding - kernel) // stride + 1 for size in x.shape[2:]]
    return [*x.shape, kernel, kernel, stride, stride, padding, padding, 1, 1, *out, 1]


def seconds(x, shape, out, algorithm, threads):
    start = time.perf_counter()
    _C.covariance_cpu(
        x.data_ptr(), 0, list(x.stride()), shape, False, algorithm, False, 0.0, 1.0, out.data_ptr(), threads
    )
    return time.perf_counter() - start


def measure(samples, channels, size, kernel, stride, threads, rounds=7):
    x = torch.randn(samples, channels, size, size)
    out = torch.zeros(channels * kernel * kernel, channels * kernel * kernel)
    shape = shape_of(x, kernel, stride)
    times = {SHIFT: [], PATCHES: []}
    for round_number in range(rounds + 1):
        for algorithm, values in times.items():
            value = seconds(x, shape, out, algorithm, threads)
            if round_number:
                values.append(value)
    shift, patches = (statistics.median(times[a]) for a in (SHIFT, PATCHES))
    cost_shift, cost_patches = _C.covariance_costs(shape)
    chosen = shift if cost_shift <= cost_patches else patches
    return {
        "shape": list(x.shape),
        "kernel": kernel,
        "stride": stride,
        "shift_ms": 1e3 * shift,
        "patches_ms": 1e3 * patches,
        "ratio": patches / shift,
        "predicted": cost_patches / cost_shift,
        "lost": chosen / min(shift, patches) - 1,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="write the table as JSON")
    arguments = parser.parse_args()
    rows = []
    print("kernel stride  size channels  shift ms  patches ms  ratio  predicted  lost")
    for kernel, stride in KERNELS:
        for size in SIZES:
            for channels in CHANNELS:
                row = measure(arguments.samples, channels, size, kernel, stride, arguments.threads)
                rows.append(row)
                print(
                    f"{kernel:6} {stride:6} {size:5} {channels:8} {row['shift_ms']:9.3f} {row['patches_ms']:11.3f}"
                    f" {row['ratio']:6.2f} {row['predicted']:10.2f} {row['lost']:5.0%}",
                    flush=True,
                )
    lost = [row["lost"] for row in rows]
    print(
        f"rule right in {sum(v == 0 for v in lost)} of {len(lost)} shapes, mean time lost {statistics.mean(lost):.1%}"
    )
    if arguments.out:
        with open(arguments.out, "w") as file:
            json.dump({"threads": arguments.threads, "machine": _C.cpu_info(), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
