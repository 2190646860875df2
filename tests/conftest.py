"""What all tests share: devices that can be tested here, thread counts, comparison with an oracle."""

import os
from importlib.util import find_spec

import pytest

# Each process of a parallel run has a core; read when torch is imported, and by the programs that tests start.
# Threads of one process that wait busily take the core of another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import kfac_ext
from bench.zoo.environment import prepare


def prepare_for(package):
    """What networks of a package need to be imported and to stay offline; skips a test, or a module, without it.

    In a fixture it keeps the names of the tests that were not run.
    """
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)
    prepare()


def thorough(cases, *, but=None, seldom=()):
    """Parameters of a test: all but those in `but`, or those that are `seldom`, are in `make test-thorough` alone.

    A case that is a tuple stands for several parameters.
    """
    named = seldom if but is None else but
    missing = [name for name in named if name not in cases]
    assert not missing, f"{missing} are no cases"
    rare = [case for case in cases if (case in named) == (but is None)]
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.thorough if case in rare else ()
        )
        for case in cases
    ]


def _devices():
    reason = "no CUDA device" if not torch.cuda.is_available() else "no CUDA kernels in this build"
    ready = torch.cuda.is_available() and bool(kfac_ext.build_info()["cuda_architectures"])
    return ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not ready, reason=reason))]


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(params=_devices())
def device(request):
    return request.param


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def relative_error(value, oracle):
    """|value - oracle| / |oracle| in the Frobenius norm, in float64."""
    value, oracle = value.double().cpu(), oracle.double().cpu()
    assert value.shape == oracle.shape
    return float((value - oracle).norm() / oracle.norm().clamp_min(1e-300))
