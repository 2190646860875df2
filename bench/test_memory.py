"""Peak extra memory of every operation, each in a process of its own."""

import json
import os
import statistics
import subprocess
import sys

import pytest
import torch

from bench import memory, worksets
from bench.machine import ROOT

NETWORKS = worksets.networks()
QUICK = ("VGG-small b64",)
LINEAR_ALGEBRA = ("VGG-small b64", "VGG19 b32")  # small and large: it is a matter of the matrices' sizes alone


def peak(operation: str, network: str, variant: str) -> int:
    command = [sys.executable, "-m", "bench.memory", operation, network, variant, str(torch.get_num_threads())]
    environment = {**os.environ, **memory.ENVIRONMENT}
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=600, env=environment)
    return json.loads(run.stdout.splitlines()[-1])["bytes"]


@pytest.mark.parametrize("operation", memory.OPERATIONS)
@pytest.mark.parametrize("network", NETWORKS)
def test_peak(benchmark, record, quick, network, operation):
    reason = memory.supported()
    if reason:
        pytest.skip(reason)
    if (quick and network not in QUICK) or (operation != "covariance" and network not in LINEAR_ALGEBRA):
        pytest.skip("full runs only")
    found: dict[str, list[int]] = {variant: [] for variant in memory.OPERATIONS[operation][1]}

    def one_round():
        for variant, values in found.items():
            values.append(peak(operation, network, variant))

    benchmark.pedantic(one_round, rounds=2 if operation == "covariance" and not quick else 1, iterations=1)
    variants = {name: {"median": statistics.median(v), "min": min(v), "max": max(v)} for name, v in found.items()}
    largest = max(layer.input_bytes for layer in NETWORKS[network])
    record("memory", f"{operation}, {network}", "memory", "bytes", variants, largest_activation=largest)
    shown = ", ".join(f"{name} {v['median'] / 2**20:.1f} MiB" for name, v in variants.items())
    print(f"\n  memory / {operation}, {network}: {shown}, largest activation {largest / 2**20:.1f} MiB", end="")
