"""Calls from several Python threads and from forks, and which bits depend on the number of threads."""

import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import kfac_ext
from kfac_ext.ops import refuse_free_threading
from tests.conftest import thorough


def tensors_of(result):
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for part in result for tensor in tensors_of(part)]


def definite(n):
    x = torch.randn(n + 3, n)
    return x.mT @ x / n + 0.1 * torch.eye(n)


def calls():
    torch.manual_seed(1)
    x, rows = torch.randn(9, 20, 14, 13), torch.randn(700, 90)
    M, V, H, G = [definite(n) for n in (40, 300, 7)], torch.randn(33, 120), definite(120), definite(33)
    columns = torch.arange(120).view(30, 4)
    return {
        "linear_covariance": lambda: kfac_ext.linear_covariance(rows, bias=True),
        "conv2d_covariance": lambda: kfac_ext.conv2d_covariance(x, 3, padding=1, bias=True),
        "conv2d_covariance reduce": lambda: kfac_ext.conv2d_covariance(x, 3, padding=1, mode="reduce"),
        "gradient_covariance": lambda: kfac_ext.gradient_covariance(x),
        "damped_inverse": lambda: kfac_ext.damped_inverse(M, 0.1),
        "power_iteration": lambda: kfac_ext.power_iteration(M, max_iter=9),
        "covariance_power_iteration": lambda: kfac_ext.covariance_power_iteration(x, 3, padding=1, max_iter=9),
        "row power iteration": lambda: kfac_ext.covariance_power_iteration(rows, max_iter=9),
        "obs_saliency": lambda: kfac_ext.obs_saliency([V], [H], [G], [4]),
        "compensate": lambda: kfac_ext.compensate([V], [H], [torch.arange(50)]),
        "greedy_selection": lambda: kfac_ext.greedy_selection([V], [H], [G], [columns], 9),
    }


CALLS = calls()
DEPENDING = {"linear_covariance", "conv2d_covariance", "gradient_covariance"}
"""Each thread sums its own samples where the result is small; docs/reliability.md says so."""


def equal(found, wanted):
    return all(torch.equal(a, b) for a, b in zip(tensors_of(found), tensors_of(wanted), strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits_again(name, threads):
    assert equal(CALLS[name](), CALLS[name]())


@pytest.mark.parametrize("name", CALLS)
def test_bits_and_the_number_of_threads(name):
    found = []
    for count in (1, 2, 3, 1):
        torch.set_num_threads(count)
        found.append(CALLS[name]())
    torch.set_num_threads(1)
    assert equal(found[0], found[3])
    if name in DEPENDING:
        for a, b in zip(tensors_of(found[0]), tensors_of(found[1])):
            torch.testing.assert_close(a, b)
    else:
        assert equal(found[0], found[1]) and equal(found[0], found[2])


def test_two_python_threads_at_once(threads):
    wanted = {name: call() for name, call in CALLS.items()}
    with ThreadPoolExecutor(3) as pool:
        names = [name for name in CALLS for _ in range(4)]
        found = [(name, pool.submit(CALLS[name])) for name in names]
        assert all(equal(future.result(), wanted[name]) for name, future in found)


def test_plans_asked_for_by_several_threads():
    def sum_of(size):
        return float(kfac_ext.conv2d_covariance(torch.ones(1, 1, size, size), 9, padding=4).sum())

    sizes = [10 + i % 7 for i in range(40)]
    alone = {size: sum_of(size) for size in set(sizes)}
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(sum_of, sizes)) == [alone[size] for size in sizes]


FORKS = """
import os, sys
import torch
from tests.ops.test_threads import CALLS, tensors_of
def equal(found, wanted):  # without torch, which compares with threads of its own
    return all((a.numpy() == b.numpy()).all() for a, b in zip(tensors_of(found), tensors_of(wanted), strict=True))
torch.set_num_threads(int(sys.argv[1]))
names = [name for name in CALLS if name != "greedy_selection"]  # whose products in torch want torch's pool
wanted = {name: CALLS[name]() for name in names}
child = os.fork()
if child == 0:
    os._exit(not all(equal(CALLS[name](), wanted[name]) for name in names))
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("threads", thorough([1, 2], but=[2]))
def test_forks_after_use(threads):
    """In a fresh process: children of one that has used torch's own threads must not use torch."""
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", FORKS, str(threads)], capture_output=True, text=True, timeout=120, cwd=root
    )
    assert run.returncode == 0, run.stderr


def test_free_threaded_python_is_refused(monkeypatch):
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: 1 if name == "Py_GIL_DISABLED" else None)
    with pytest.raises(ImportError, match="free-threaded CPython"):
        refuse_free_threading()
