"""The latency of a network, measured, and a table by which to predict what removing neurons gives.

Before training, the network is timed at its full widths and in copies cut to a half, a quarter and the least the limits
allow: each as a whole, and each linear and convolution layer inside it. A layer's seconds are then a curve over its
multiply-accumulates, the rest (norms, activations, poolings, the interpreter) one over the number of outputs, both
linear between the points and made ascending. During selection the latency of a network is the sum of its curves.
This table decides every event but the last, so that a run which goes on from a state that holds it removes the same
neurons. At the last event the network itself is timed, before choosing and after every cut: the curves are scaled to
what was found, and removal goes on until the measured latency meets the target. Two runs differ as their timings do.
"""

from __future__ import annotations

import bisect
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flatprune.coupling import Coupling, NeuronGroup
from flatprune.cutting.surgery import plan
from flatprune.pruning.limits import Limits
from kfac_ext.curvature.modes import device_of, module_modes, undisturbed

_FRACTIONS = (1.0, 0.5, 0.25, 0.0)  # of every width, for the networks that are timed
_WARM_UP, _LEAST_REPEATS, _MOST_REPEATS = 2, 5, 50
_SECONDS = 0.25  # for the repetitions of one network
REST = ""  # key of the curve of all that is no layer

_clock = time.perf_counter
Curve = list[tuple[float, float]]  # (work, seconds), ascending


@dataclass
class LatencyTable:
    """What was measured; plain values in a `state_dict`.

    Attributes:
        curves: layer -> its curve; "" for all the rest.
        scale: by how much the curves were off when the network was last timed.
    """

    curves: dict[str, Curve] = field(default_factory=dict)
    scale: float = 1.0

    def seconds(self, work: Mapping[str, float]) -> float:
        """Latency of a network whose layers do this much work."""
        return self.scale * sum(_interpolate(curve, work[name]) for name, curve in self.curves.items())

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return {"curves": {name: [list(point) for point in c] for name, c in self.curves.items()}, "scale": self.scale}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> LatencyTable:
        """The inverse of `state_dict`."""
        return cls({name: [(x, y) for x, y in curve] for name, curve in state["curves"].items()}, state["scale"])


def measure_table(
    model: nn.Module,
    coupling: Coupling,
    inputs: tuple[Any, ...],
    layers: Sequence[str],
    limits: Limits,
    work_of: Callable[[Sequence[NeuronGroup]], Mapping[str, float]],
) -> LatencyTable:
    """Time the network and copies of it that are cut to fractions of their widths.

    Args:
        model: the network; nothing of it changes.
        coupling: its neuron groups.
        inputs: what it is called with (see `batch_of`).
        layers: names of those that are timed one by one.
        limits: how narrow the narrowest copy is.
        work_of: from the groups of a copy to the work of each layer, and under "" (`REST`) that of all the rest.
    """
    points: dict[str, Curve] = {}
    for fraction in _FRACTIONS:
        network, own = _cut_copy(model, coupling, limits, fraction)
        whole = measure(network, inputs)
        inside_of = _layer_seconds(network, inputs, layers)
        inside = sum(inside_of.values())
        fit = min(1.0, whole / inside) if inside > 0.0 else 1.0  # looking at every layer costs time too
        seconds = {name: fit * value for name, value in inside_of.items()}
        seconds[REST] = whole - sum(seconds.values())
        for name, work in work_of(own).items():
            points.setdefault(name, []).append((work, seconds[name]))
    return LatencyTable({name: _ascending(curve) for name, curve in points.items()})


def measure(model: nn.Module, inputs: tuple[Any, ...], keywords: Mapping[str, Any] | None = None) -> float:
    """Seconds of one forward in evaluation mode without gradients: the median over repeats, after a warm-up."""
    device = device_of(model)

    def once() -> float:
        start = _now(device)
        model(*inputs, **(keywords or {}))
        return _now(device) - start

    with _inference(model):
        return statistics.median(once() for _ in range(_warm_up(once)))


def _layer_seconds(model: nn.Module, inputs: tuple[Any, ...], names: Sequence[str]) -> dict[str, float]:
    """Seconds of each layer in one forward, summed over its calls; medians over repeats."""
    device = device_of(model)
    modules = dict(model.named_modules())
    spent = dict.fromkeys(names, 0.0)
    runs: list[dict[str, float]] = []

    def start(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            spent[name] -= _now(device)

        return hook

    def stop(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            spent[name] += _now(device)

        return hook

    def once() -> float:
        spent.update(dict.fromkeys(names, 0.0))
        begun = _now(device)
        model(*inputs)
        runs.append(dict(spent))
        return _now(device) - begun

    handles = [modules[name].register_forward_pre_hook(start(name)) for name in names]
    handles += [modules[name].register_forward_hook(stop(name)) for name in names]
    try:
        with _inference(model):
            repeats = _warm_up(once)
            runs.clear()
            for _ in range(repeats):
                once()
    finally:
        for handle in handles:
            handle.remove()
    return {name: statistics.median(run[name] for run in runs) for name in names}


def _warm_up(once: Callable[[], float]) -> int:
    """Run a few times, and say how many repetitions the time allows."""
    seconds = [once() for _ in range(_WARM_UP)][-1]
    return min(_MOST_REPEATS, max(_LEAST_REPEATS, int(_SECONDS / max(seconds, 1e-9))))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return _clock()


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    with module_modes(dict.fromkeys(model.modules(), False)), undisturbed(model), torch.no_grad():
        yield


def batch_of(inputs: tuple[Any, ...], size: int) -> tuple[Any, ...]:
    """Example inputs repeated to `size` samples; tensors without the first one's first dimension stay as they are."""
    samples = len(inputs[0])
    index = torch.arange(size) % samples

    def repeated(value: Any) -> Any:
        is_batch = isinstance(value, Tensor) and value.dim() > 0 and len(value) == samples
        return value[index.to(value.device)] if is_batch else value

    return tuple(repeated(value) for value in inputs)


def _cut_copy(
    model: nn.Module, coupling: Coupling, limits: Limits, fraction: float
) -> tuple[nn.Module, list[NeuronGroup]]:
    """A copy of the network with a fraction of every group's neurons, or as many as the limits demand; its groups."""
    network, own = copy.deepcopy(model), copy.deepcopy(coupling)
    pruned = {}
    for position, group in enumerate(own.groups):
        step = limits.step(group) // group.groups
        count = (group.width - max(limits.floor(group), round(fraction * group.width))) // group.groups
        if count // step:
            parts = [(group.group_of == part).nonzero().flatten() for part in range(group.groups)]
            pruned[position] = torch.cat([part[: count // step * step] for part in parts])
    if pruned:
        plan(network, own, pruned).commit()
    return network, own.groups


def _ascending(points: Curve) -> Curve:
    """Points by work, each at least as slow as those before it; of equal work the slowest."""
    slowest: dict[float, float] = {}
    for work, seconds in sorted(points):
        slowest[work] = max(seconds, 0.0, *slowest.values())
    return list(slowest.items())


def _interpolate(curve: Curve, work: float) -> float:
    """Seconds at `work`, linear between the points and flat beyond them."""
    right = bisect.bisect_left(curve, (work, -1.0))
    if right == 0:
        return curve[0][1]
    if right == len(curve):
        return curve[-1][1]
    (x0, y0), (x1, y1) = curve[right - 1], curve[right]
    return y0 + (y1 - y0) * (work - x0) / (x1 - x0)
