"""Operators where memory runs out: a MemoryError and an `out` that was not touched, or a result that is right."""

import os
import random
import resource
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kfac_ext
from bench.hard.batches import Found, run_forked
from bench.hard.random_calls import definite
from bench.hard.tally import Tally

SIZES = {"quick": 300, "full": 5000}

_DIFFERENT = "the result is another than with enough memory"


def run(cases: int, seed: int, seconds: float, first: int = 0) -> Tally:
    """Each case has a process of its own: the limit stays once it is set."""
    return run_forked("memory", _case, cases, seed, seconds, batch=20, first=first)


def _case(seed: int, index: int) -> Found:
    rng = random.Random(f"memory {seed} {index}")
    torch.manual_seed(rng.getrandbits(60))
    name = rng.choice(list(_OPERATIONS))
    call, copies = _OPERATIONS[name](rng)
    # torch's own products end the process where OpenMP gets no thread
    threads, room = 1 if name == "greedy_selection" else rng.choice((1, 2, 3)), int(2 ** rng.uniform(12, 27))
    shown = f"{name}, {threads} threads, {room >> 10} KiB"
    expected = _results(call())
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, _tried(call, copies, expected, threads, room).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as stream:
        text = stream.read()
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return [("crashed", f"{shown}: signal {os.WTERMSIG(status)}")]
    if status or not text:
        return [("crashed", f"{shown}: exit {status >> 8}")]
    kind, _, message = text.partition(" ")
    return [] if kind == "ok" else [(kind, f"{shown}: {message}")]


def _results(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result.clone()]
    return [tensor for part in result for tensor in _results(part)] if isinstance(result, (list, tuple)) else []


def _tried(
    call: Callable[[], Any], kept: list[tuple[Tensor, Tensor]], expected: list[Tensor], threads: int, room: int
) -> str:
    for tensor, before in kept:
        tensor.copy_(before)
    torch.set_num_threads(threads)
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    found = failure = None
    resource.setrlimit(resource.RLIMIT_AS, (taken + room, most))
    try:
        found = call()
    except BaseException as error:
        failure = error
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    if failure is not None:
        if any(not torch.equal(tensor, before) for tensor, before in kept):
            return "wrong `out` was changed before the memory ran out"
        fits = isinstance(failure, (MemoryError, RuntimeError))
        return "ok" if fits else f"unclear {type(failure).__name__}: {failure}"
    same = all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(_results(found), expected))
    return "ok" if same else f"wrong {_DIFFERENT}"


# ---- operations, with tensors that must be as they were where memory ran out ----

Operation = tuple[Callable[[], Any], list[tuple[Tensor, Tensor]]]


def _image(rng: random.Random) -> Tensor:
    return torch.randn(rng.randint(1, 8), rng.choice((3, 16, 40)), rng.randint(6, 30), rng.randint(6, 30))


def _conv(rng: random.Random, mode: str, groups: int = 1) -> Operation:
    x = _image(rng)
    x = x[:, : x.shape[1] // groups * groups]
    kernel, stride = rng.choice((1, 3, 5)), rng.choice((1, 2))
    d = x.shape[1] // groups * kernel**2
    out = torch.randn((groups, d, d) if groups > 1 else (d, d))
    place = {"padding": kernel // 2, "stride": stride, "groups": groups, "mode": mode}
    before = out.clone()

    def call() -> Tensor:
        return kfac_ext.conv2d_covariance_(out, x, kernel, decay=0.9, scale=0.1, **place)

    return call, [(out, before)]


def _linear(rng: random.Random) -> Operation:
    x = torch.randn(rng.randint(1, 3000), rng.randint(1, 600))
    out = torch.randn(x.shape[1], x.shape[1])
    before = out.clone()
    return lambda: kfac_ext.linear_covariance_(out, x, decay=0.9, scale=0.1), [(out, before)]


def _fresh(call: Callable[[], Any]) -> Operation:
    return call, []


def _inverse(rng: random.Random) -> Operation:
    matrices = [definite(rng, rng.randint(1, 300), torch.float32) for _ in range(rng.randint(1, 5))]
    return _fresh(lambda: kfac_ext.damped_inverse(matrices, 0.1))


def _power(rng: random.Random) -> Operation:
    matrices = [definite(rng, rng.randint(1, 500), torch.float32) for _ in range(rng.randint(1, 4))]
    return _fresh(lambda: list(kfac_ext.power_iteration(matrices, max_iter=3)[:1]))


def _covariance_power(rng: random.Random) -> Operation:
    x = _image(rng)
    return _fresh(lambda: list(kfac_ext.covariance_power_iteration(x, 3, padding=1, max_iter=2)[:1]))


def _neurons(rng: random.Random) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    d, outputs = rng.randint(10, 300), rng.randint(1, 200)
    V = torch.randn(outputs, d)
    return [V], [definite(rng, d, torch.float32)], [definite(rng, outputs, torch.float32)]


def _saliency(rng: random.Random) -> Operation:
    V, H, G = _neurons(rng)
    return _fresh(lambda: kfac_ext.obs_saliency(V, H, G, [1]))


def _compensate(rng: random.Random) -> Operation:
    V, H, _ = _neurons(rng)
    pruned = torch.randperm(V[0].shape[1])[: V[0].shape[1] // 2]
    return _fresh(lambda: kfac_ext.compensate(V, H, [pruned]))


def _greedy(rng: random.Random) -> Operation:
    V, H, G = _neurons(rng)
    columns = [torch.arange(V[0].shape[1])[:, None]]
    return _fresh(lambda: list(kfac_ext.greedy_selection(V, H, G, columns, 4)[1:]))


_OPERATIONS: dict[str, Callable[[random.Random], Operation]] = {
    "conv2d_covariance_": lambda rng: _conv(rng, "expand"),
    "conv2d_covariance_ reduce": lambda rng: _conv(rng, "reduce"),
    "conv2d_covariance_ grouped": lambda rng: _conv(rng, "expand", 3),
    "linear_covariance_": _linear,
    "damped_inverse": _inverse,
    "power_iteration": _power,
    "covariance_power_iteration": _covariance_power,
    "obs_saliency": _saliency,
    "compensate": _compensate,
    "greedy_selection": _greedy,
}
