"""Peak extra memory of one computation, measured in a process of its own.

    python -m bench.memory covariance "VGG-small b64" native

The resident set's high-water mark (VmHWM, set back through /proc/self/clear_refs) minus the resident set right before,
inputs and factors in place already: so buffers of native code, of torch and of its libraries all count. A small
call of the same kind comes first, so that code and thread pools do not. What is freed goes back to the system at once
(ENVIRONMENT, malloc_trim), else a block freed before would be used again unseen; blocks below 64 KiB may be.
Linux only.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import kfac_ext
from bench import baselines, worksets
from bench.worksets import LayerShape

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
DAMPING = 1e-2


def supported() -> str | None:
    """None where it can be measured, else why not."""
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError as error:
        return f"needs Linux's /proc/self/clear_refs ({error})"
    return None


def _kilobytes(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())
    assert found
    return int(found[1])


def _trim() -> None:
    """Give freed memory back, where the C library has a way."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_extra(run: Callable[[], Any]) -> int:
    """Bytes by which the resident set grew at most while `run` ran, what it returned included."""
    gc.collect()
    _trim()
    _CLEAR.write_text(_RESET_PEAK)
    before = _kilobytes("VmRSS")
    keep = run()
    after = _kilobytes("VmHWM")
    del keep
    return max(0, after - before) * 1024


def _covariance(layers: list[LayerShape], variant: str) -> Callable[[], None]:
    """Running averages A <- 0.95 A + 0.05 new of every layer, one layer after the other."""
    shared = {worksets.layer_shape_key(layer): worksets.activation(layer) for layer in layers}
    inputs = [shared[worksets.layer_shape_key(layer)] for layer in layers]
    averages = [torch.zeros(layer.groups, layer.patch, layer.patch).squeeze(0) + 1 for layer in layers]

    def native() -> None:
        for layer, x, A in zip(layers, inputs, averages):
            if layer.is_convolution:
                kfac_ext.conv2d_covariance_(A, x, layer.kernel, decay=0.95, scale=0.05, **layer.geometry)
            else:
                kfac_ext.linear_covariance_(A, x, decay=0.95, scale=0.05)

    def plain() -> None:
        method = {"unfold": baselines.by_unfold, "strided": baselines.by_strides}[variant]
        for layer, x, A in zip(layers, inputs, averages):
            baselines.blend_(A, method(x, layer), 0.95, 0.05)

    return native if variant == "native" else plain


def _inverse(layers: list[LayerShape], variant: str) -> Callable[[], Any]:
    matrices = worksets.factors(layers)
    if variant == "native":
        return lambda: kfac_ext.damped_inverse(matrices, DAMPING)
    return lambda: baselines.cholesky_inverses(matrices, DAMPING)


def _power(layers: list[LayerShape], variant: str) -> Callable[[], Any]:
    matrices = worksets.factors(layers)
    vectors = [torch.ones(len(m)) for m in matrices]
    if variant == "native":
        return lambda: kfac_ext.power_iteration(matrices, vectors)
    return lambda: baselines.power_loop(matrices, vectors, 1e-3, 100)


def _saliency(layers: list[LayerShape], variant: str) -> Callable[[], Any]:
    matrices, weights = worksets.factors(layers), [worksets.weight(layer) for layer in layers]
    inverses = kfac_ext.damped_inverse(matrices[::2], DAMPING)
    blocks = [layer.kernel**2 for layer in layers]
    of = kfac_ext if variant == "native" else kfac_ext.reference
    return lambda: of.obs_saliency(weights, inverses, matrices[1::2], blocks)


OPERATIONS: dict[str, tuple[Callable[[list[LayerShape], str], Callable[[], Any]], tuple[str, ...]]] = {
    "covariance": (_covariance, ("native", "unfold", "strided")),
    "inverse": (_inverse, ("native", "cholesky")),
    "power iteration": (_power, ("native", "loop")),
    "saliency": (_saliency, ("native", "batched")),
}
_TINY = [LayerShape("", 2, 4, 4, 8, 3), LayerShape("", 2, 4, 4)]


def main(operation: str, network: str, variant: str, threads: str = "") -> None:
    """Print the bytes."""
    if threads:
        torch.set_num_threads(int(threads))
    make, _ = OPERATIONS[operation]
    run = make(worksets.networks()[network], variant)
    make(_TINY, variant)()
    print(json.dumps({"bytes": peak_extra(run)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
