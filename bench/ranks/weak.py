"""Weak scaling: each process has 64 images a step and one thread, alone and with others.

    python -m bench.ranks.weak
    torchrun --standalone --nproc_per_node=2 -m bench.ranks.weak

Blocks of steps of all variants take turns, so that what else runs on the machine hits all alike. Says for each variant
the median wall time and the mean CPU time of a step, and of the curvature's collectives calls, bytes and waits.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import flatprune

VARIANTS = ("bare", "curvature", "flatness", "pruner")
_STEPS = 1000  # that the flatness term reckons with
_WARM_UP, _BLOCK = 3, 10


def network() -> nn.Module:
    """Six 3x3 convolutions with batch norms, 32 to 128 channels wide."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    channels = 3
    for width, pools in ((32, False), (32, True), (64, False), (64, True), (128, False), (128, True)):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pools else []
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class Variant:
    """One training, with as much of the method as its name says."""

    def __init__(self, name: str, rank: int, ranks: int) -> None:
        self.name, self.model = name, network()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.05, momentum=0.9)
        self.parallel: nn.Module = DistributedDataParallel(self.model) if ranks > 1 else self.model
        self.generator = torch.Generator().manual_seed(rank)
        self.curvature: Any = None if name == "bare" else flatprune.Curvature(self.parallel)
        self.flatness = self.pruner = None
        if name in ("flatness", "pruner"):
            self.flatness = flatprune.Flatness(self.curvature, total_steps=_STEPS, start=_WARM_UP)
        if name == "pruner":
            schedule = flatprune.CubicSchedule(8 * _BLOCK, 0.3, 1.0, 2 * _BLOCK)
            target = flatprune.Target(params=0.9)
            self.pruner = flatprune.Pruner(
                self.parallel, self.optimizer, self.curvature, torch.randn(2, 3, 32, 32), target=target,
                total_steps=8 * _BLOCK, schedule=schedule,
            )  # fmt: skip
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.events: list[float] = []

    def steps(self, count: int) -> None:
        """Take so many, and note what each took."""
        for _ in range(count):
            x = torch.randn(64, 3, 32, 32, generator=self.generator)
            y = torch.randint(10, (64,), generator=self.generator)
            wall, cpu = time.perf_counter(), time.process_time()
            self.optimizer.zero_grad()
            output = self.parallel(x)
            loss = F.cross_entropy(output, y)
            objective = loss if self.flatness is None else loss + self.flatness.penalty(x, output, loss)
            objective.backward()
            self.optimizer.step()
            is_event = self.pruner is not None and self.pruner.is_event()
            if self.pruner is not None:
                self.pruner.step()
            kept = self.events if is_event else self.wall
            kept.append(time.perf_counter() - wall)
            if not is_event:
                self.cpu.append(time.process_time() - cpu)

    def report(self) -> str:
        """One line, and one a purpose."""
        events = f", steps with an event {[round(1e3 * e) for e in self.events]} ms" if self.events else ""
        wall, cpu = 1e3 * statistics.median(self.wall), 1e3 * statistics.mean(self.cpu)
        lines = [f"{self.name:10} wall {wall:6.0f} ms, CPU {cpu:6.1f} ms a step{events}"]
        traffic = {} if self.curvature is None or self.curvature.group is None else self.curvature.group.traffic
        for purpose, entry in traffic.items():
            each = f"{entry.bytes / entry.calls / 1e6:.3f} MB and {1e3 * entry.seconds / entry.calls:.1f} ms a call"
            lines.append(f"    {purpose:20} {entry.calls:4} calls, {each}")
        return "\n".join(lines)


def main() -> None:
    """Measure all variants and print on the first process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=7)
    blocks = parser.parse_args().blocks
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if ranks > 1 else 0
    variants = [Variant(name, rank, ranks) for name in VARIANTS]
    for variant in variants:
        variant.steps(_WARM_UP)
        variant.wall.clear()
        variant.cpu.clear()
    for _ in range(blocks):
        for variant in variants:
            variant.steps(_BLOCK)
    if rank == 0:
        print(f"{ranks} processes, {blocks * _BLOCK} steps of each variant")
        print("\n".join(variant.report() for variant in variants), flush=True)
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
