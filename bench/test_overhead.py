"""What a call costs when there is nothing to compute, and what importing costs."""

import json
import subprocess
import sys

import pytest
import torch

import kfac_ext
from bench import peers
from bench.machine import PEERS, ROOT
from bench.timing import figures

x = torch.randn(4, 4)
image = torch.randn(2, 2, 4, 4)
matrix = x @ x.T + torch.eye(4)
vector = torch.ones(4)
out = torch.zeros(4, 4)
CALLS = {
    "linear_covariance": lambda of: lambda: of.linear_covariance(x),
    "linear_covariance_": lambda of: lambda: of.linear_covariance_(out, x, decay=0.9, scale=0.1),
    "conv2d_covariance": lambda of: lambda: of.conv2d_covariance(image, 3, padding=1),
    "gradient_covariance": lambda of: lambda: of.gradient_covariance(x),
    "damped_inverse": lambda of: lambda: of.damped_inverse([matrix], 0.1),
    "power_iteration": lambda of: lambda: of.power_iteration([matrix], [vector], tol=0, max_iter=1),
    "obs_saliency": lambda of: lambda: of.obs_saliency([x], [matrix], [matrix], [1]),
}


@pytest.mark.parametrize("name", CALLS)
def test_call(measure, name):
    """On 4 x 4 matrices: all of it is overhead."""
    measure("call overhead", name, {"native": CALLS[name](kfac_ext), "plain": CALLS[name](kfac_ext.reference)})


IMPORT = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
seconds = {}
for name in sys.argv[1:]:
    start = time.perf_counter()
    __import__(name)
    seconds[name] = time.perf_counter() - start
print(json.dumps(seconds))
"""


def import_seconds(*names):
    """Time of each import in turn, in a new process."""
    run = subprocess.run(
        [sys.executable, "-c", IMPORT, *names], capture_output=True, text=True, check=True, cwd=ROOT, timeout=300
    )
    return json.loads(run.stdout.splitlines()[-1])


def test_import(benchmark, record, quick):
    """Each after torch, which all need; peers alternating with ours."""
    there = [name for name in PEERS if peers.load(name) is None]
    if quick:
        there = []
    times = {}

    def round_of_imports():
        found = import_seconds("torch", "kfac_ext", "flatprune")
        for peer in there:
            found[peer] = import_seconds("torch", peer)[peer]
        for name, seconds in found.items():
            times.setdefault(name, []).append(seconds)

    import_seconds("torch", "kfac_ext", "flatprune")  # byte code, file cache
    benchmark.pedantic(round_of_imports, rounds=3 if quick else 7, iterations=1)
    variants = {}
    for name, values in times.items():
        label = (
            name if name == "torch" else f"{name}, after kfac_ext" if name == "flatprune" else f"{name}, after torch"
        )
        variants[label] = figures(values)
    skipped = {} if quick else {name: peers.load(name) for name in PEERS if name not in there}
    record("import", "import time", "time", "s", variants, rounds=len(times["torch"]), skipped=skipped)
