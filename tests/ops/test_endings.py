"""How a call ends before its time: no memory, Ctrl-C; what is kept between calls is bounded."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

import kfac_ext
from kfac_ext import _C

LONG = {
    "inverse": lambda: kfac_ext.damped_inverse([torch.eye(6000)], 1.0),
    "power": lambda: kfac_ext.power_iteration([torch.randn(3000, 3000)], tol=0.0, max_iter=10**6),
    "rows": lambda: kfac_ext.linear_covariance(torch.ones(1, 1500).expand(10**7, 1500)),
    "patches": lambda: kfac_ext.conv2d_covariance(torch.ones(1, 1, 1, 1).expand(10**5, 64, 64, 64), 3),
    "patch power": lambda: kfac_ext.covariance_power_iteration(torch.ones(64, 64, 32, 32), 3, tol=0.0, max_iter=10**6),
    "row power": lambda: kfac_ext.covariance_power_iteration(torch.ones(20000, 500), tol=0.0, max_iter=10**6),
    "scores": lambda: kfac_ext.obs_saliency([torch.ones(6000, 6000)], [torch.eye(6000)], [torch.eye(6000)], [1]),
}


@contextlib.contextmanager
def interrupted():
    """Ctrl-C while the body runs; again after a while, since Python drops one that comes within a finalizer."""
    over = threading.Event()

    def interrupt():
        wait = 0.15
        while not over.wait(wait):
            os.kill(os.getpid(), signal.SIGINT)
            wait = 5

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have background jobs ignore it
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", LONG)
def test_ctrl_c_ends_a_long_call(name, threads):
    ended = []
    with interrupted():
        LONG[name]()
        ended.append(name)  # it was not long enough, or was not interrupted
        time.sleep(20)
    assert not ended


def test_an_interrupted_blend_leaves_the_past():
    out = torch.eye(1500)
    with interrupted():
        kfac_ext.linear_covariance_(out, torch.ones(1, 1500).expand(10**7, 1500), decay=0.9, scale=0.1)
    assert torch.equal(out, torch.eye(1500))


def test_a_handler_that_does_not_raise_interrupts_nothing():
    seen = []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    try:
        inverse = kfac_ext.damped_inverse([torch.eye(2500)], 1.0)[0]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)  # one that comes later would end the process
        signal.signal(signal.SIGALRM, before)
    assert seen
    torch.testing.assert_close(inverse, torch.eye(2500) / 2)


STARVED = """
import json, os, resource, sys, torch, kfac_ext
torch.set_num_threads(1)
x, big = torch.randn(8, 64, 20, 20), torch.randn(1000, 400)
M, V, A, G = [torch.eye(200) + 0.01 for _ in range(4)], [torch.randn(64, 450)], [torch.eye(450)], [torch.eye(64)]
calls = {
    "conv2d_covariance": lambda: kfac_ext.conv2d_covariance(x, 3, padding=1),
    "reduce": lambda: kfac_ext.conv2d_covariance(x, 3, padding=1, mode="reduce"),
    "linear_covariance": lambda: kfac_ext.linear_covariance(big),
    "damped_inverse": lambda: kfac_ext.damped_inverse(M, 0.1),
    "covariance_power_iteration": lambda: kfac_ext.covariance_power_iteration(x, 3, padding=1, max_iter=2),
    "obs_saliency": lambda: kfac_ext.obs_saliency(V, A, G, [9]),
    "compensate": lambda: kfac_ext.compensate(V, A, [torch.arange(300)]),
    "power_iteration": lambda: kfac_ext.power_iteration(M, max_iter=3),
}
ends = {}
for name, call in calls.items():
    ends[name] = []
    for step in range(0, 26, 4):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(2)
            used = int(open("/proc/self/statm").read().split()[0]) * 4096
            resource.setrlimit(resource.RLIMIT_AS, (used + int(1.4**step * 2**16),) * 2)
            try:
                call()
            except (MemoryError, RuntimeError):
                os._exit(1)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        ends[name].append(-1 if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))
print(json.dumps(ends))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")
def test_no_memory_is_an_error_and_no_end():
    run = subprocess.run([sys.executable, "-c", STARVED], capture_output=True, text=True, check=True)
    ends = json.loads(run.stdout)
    assert len(ends) == 8
    assert {name: codes for name, codes in ends.items() if set(codes) - {0, 1}} == {}
    assert sum(1 in codes for codes in ends.values()) >= 6  # some room was too small for nearly all


def test_memory_for_what_is_too_large_is_an_error_with_a_name():
    x = torch.zeros(1).expand(2, 1, 2**25, 2**25)
    with pytest.raises(MemoryError, match="conv2d_covariance: out of memory"):
        kfac_ext.conv2d_covariance(x, 1)


def test_plans_of_varying_sizes_are_bounded():
    for size in range(20, 32):
        kfac_ext.conv2d_covariance(torch.randn(1, 1, size, size), 11, padding=5)
    plans, size = _C.plan_cache()
    assert 1 <= plans < 12 and size <= 5 << 20


def test_a_plan_that_was_dropped_is_made_again():
    x = torch.randn(2, 3, 9, 9)
    first = kfac_ext.conv2d_covariance(x, 3)
    for size in range(20, 26):
        kfac_ext.conv2d_covariance(torch.randn(1, 1, size, size), 11, padding=5)
    assert torch.equal(kfac_ext.conv2d_covariance(x, 3), first)
