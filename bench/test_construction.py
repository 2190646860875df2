"""Making a pruner, held to one training step, and its peak extra memory, held to the model's."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch

from bench import memory
from bench.construction import SUBJECTS, Construction, model_bytes
from bench.machine import ROOT
from bench.peers import load

QUICK = ("ResNet-20",)
pytestmark = pytest.mark.filterwarnings("ignore")  # what stays of a network is not the matter here


@pytest.fixture(params=SUBJECTS)
def network(request, quick):
    if quick and request.param not in QUICK:
        pytest.skip("full runs only")
    if why := load(SUBJECTS[request.param].package):
        pytest.skip(f"{SUBJECTS[request.param].package}: {why}")
    return request.param


def test_time(measure, network):
    """`Pruner(...)` of one example, and a bare step of a whole batch."""
    fresh = {}

    def prepare():
        fresh["native"] = Construction(network)

    training = Construction(network)
    variants = {"native": lambda: fresh["native"].construct(), "bare step": training.step}
    measure(
        "pruner construction",
        network,
        variants,
        before={"native": prepare},
        max_rounds=3,
        batch=list(training.batch.shape),
    )


def test_memory(benchmark, record, network):
    """Beside the model."""
    if reason := memory.supported():
        pytest.skip(reason)
    command = [sys.executable, "-W", "ignore", "-m", "bench.construction", network, str(torch.get_num_threads())]
    environment = {**os.environ, **memory.ENVIRONMENT}
    found = []

    def one_round():
        run = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=900, env=environment
        )
        found.append(json.loads(run.stdout.splitlines()[-1])["bytes"])

    benchmark.pedantic(one_round, rounds=1, iterations=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_bytes(network)
    variants = {"native": dict.fromkeys(("median", "min", "max"), found[0])}
    record("memory", f"pruner construction, {network}", "memory", "bytes", variants, model=model)
    print(f"\n  memory / pruner construction, {network}: {found[0] / model:.2f} models", end="")
