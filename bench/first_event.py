"""The first removal event of the default score: what it takes, beside a training step, and its peak extra memory.

python -m bench.first_event [NAME ...]            # of each network: event and step in seconds, their ratio
python -m bench.first_event ResNet-18 memory      # peak extra memory of an event, in a process of its own
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatprune
from bench import memory, worksets
from bench.construction import SUBJECTS as LARGE
from bench.machine import ROOT
from bench.peers import load
from flatprune import models

IMAGE, CLASSES = (3, 32, 32), 10
_ROUNDS = 3


class Subject(NamedTuple):
    """A network, a batch and its labels.

    Attributes:
        build: makes the network.
        batch: inputs and labels.
        package: that has to be there; "torch" where that is enough.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    package: str = "torch"


class _Up(nn.Module):
    """Twice the size, joined with what the encoder had there, two 3x3 convolutions."""

    def __init__(self, below: int, beside: int, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for features in (below + beside, channels):
            layers += [nn.Conv2d(features, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """[n, below, h, w] and [n, beside, 2 h, 2 w] to [n, channels, 2 h, 2 w]."""
        return self.layers(torch.cat([F.interpolate(x, scale_factor=2.0), skip], dim=1))


class UNet(nn.Module):
    """Classes of pixels, on the stages of a ResNet-18 for small images (Ronneberger et al. 2015)."""

    def __init__(self) -> None:
        super().__init__()
        resnet = models.build("resnet18", IMAGE, CLASSES)
        self.stem = nn.Sequential(resnet.conv, resnet.bn, resnet.relu)
        self.stages = resnet.stages
        self.ups = nn.ModuleList(_Up(below, beside, beside) for below, beside in ((512, 256), (256, 128), (128, 64)))
        self.head = nn.Conv2d(64, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes, h, w]."""
        x = self.stem(x)
        seen = []
        for stage in self.stages:
            x = stage(x)
            seen.append(x)
        for up, skip in zip(self.ups, seen[-2::-1]):
            x = up(x, skip)
        return self.head(x)


def _pixels(size: int) -> tuple[Tensor, Tensor]:
    x, _ = worksets.batch_of(size, IMAGE)
    return x, x.mean(dim=1).mul(3).long().clamp(0, CLASSES - 1)


def _texts() -> tuple[Tensor, Tensor]:
    tokens = LARGE["BERT-base"].batch()
    return tokens, torch.arange(len(tokens)) % LARGE["BERT-base"].classes


def _images(name: str) -> Subject:
    return Subject(partial(models.build, name, IMAGE, CLASSES), partial(worksets.batch_of, 128, IMAGE))


SUBJECTS = {
    "ResNet-18": _images("resnet18"),
    "VGG16": _images("vgg16_bn"),
    "ResNet-56": _images("resnet56"),
    "U-Net on ResNet-18": Subject(UNet, partial(_pixels, 128)),
    "BERT-base": Subject(LARGE["BERT-base"].build, _texts, "transformers"),
}


class Training:
    """A network in training, `steps` steps old, whose next `pruner.step()` is an event to half of the parameters.

    Attributes:
        pruner: of it.
    """

    def __init__(self, subject: Subject, steps: int = 2) -> None:
        torch.manual_seed(0)
        self.model = subject.build().train()
        self.x, self.y = subject.batch()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        curvature = flatprune.Curvature(self.model)
        for _ in range(steps):
            self.step()
        schedule = flatprune.CubicSchedule(1, start=0.0, end=1.0, every=1)
        target = flatprune.Target(params=0.5)
        self.pruner = flatprune.Pruner(
            self.model, self.optimizer, curvature, self.x[:2], target=target, total_steps=1, schedule=schedule
        )
        self.curvature = curvature

    def step(self) -> None:
        """One training step."""
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()

    def bare_step(self) -> None:
        """One without factors."""
        with self.curvature.paused():
            self.step()

    def event(self) -> None:
        """The event."""
        assert self.pruner.step()[0].removed

    def working_set(self) -> int:
        """Bytes of the running factors and of an A (or H) of each layer that reads neurons."""
        factors = self.curvature.factors
        reading = {m.names for group in self.pruner.groups for m in group.of_role("consumer")}
        own = {layer.weight_name: name for name, layer in self.curvature.layers.items()}
        names = {own[name] for names in reading for name in names if name in own}
        return factors.buffer.nbytes + sum(factors[f"{name}.A"].nbytes for name in names)


def seconds(subject: Subject) -> tuple[float, float]:
    """Medians of the event and of a bare step, taken in turns."""
    events, steps = [], []
    for _ in range(_ROUNDS):
        training = Training(subject)
        for times, run in ((steps, training.bare_step), (events, training.event)):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return statistics.median(events), statistics.median(steps)


def peak(name: str) -> dict[str, int]:
    """Peak extra memory of an event, and its working set, in bytes, measured in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "bench.first_event", name, "in this process"]
    environment = {**os.environ, **memory.ENVIRONMENT}
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    return json.loads(run.stdout.splitlines()[-1])


def _measured_peak(name: str) -> dict[str, int]:
    training = Training(SUBJECTS[name])
    wanted = training.working_set()
    return {"bytes": memory.peak_extra(training.event), "working_set": wanted}


def main(*arguments: str) -> None:
    """Print what the module says."""
    if arguments[1:] == ("in this process",):
        print(json.dumps(_measured_peak(arguments[0])))
        return
    of_memory = arguments[-1:] == ("memory",)
    names = arguments[:-1] if of_memory else arguments
    if unknown := [name for name in names if name not in SUBJECTS]:
        raise SystemExit(f"no network is called {' or '.join(unknown)}; there are {', '.join(SUBJECTS)}")
    for name in names or SUBJECTS:
        subject = SUBJECTS[name]
        if why := load(subject.package):
            print(f"{name}: {subject.package} {why}")
        elif of_memory:
            found = peak(name)
            print(f"{name}: {found['bytes'] / 1e6:.0f} MB more, factors and H {found['working_set'] / 1e6:.0f} MB")
        else:
            event, step = seconds(subject)
            print(f"{name}: event {event:.2f} s, step {step:.2f} s, {event / step:.2f} steps", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
