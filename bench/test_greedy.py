"""Greedy selection: how its time grows, and the first removal event of the default score against a training step."""

import pytest
import torch
import torch.nn.functional as F

import flatprune
import kfac_ext
from bench import worksets
from flatprune import models
from flatprune.pruning.schedule import CubicSchedule
from kfac_ext import reference

BATCH, IMAGE = 128, (3, 32, 32)
EVENTS = ("resnet18", "resnet56", "vgg16")
QUICK = ("resnet56",)


def operands(neurons, block=9, layers=1):
    """V, H, G and columns of layers that read `neurons` neurons and have as many outputs."""
    generator = torch.Generator().manual_seed(neurons)
    d = neurons * block
    rows = torch.randn(d // 2 + 1, d, generator=generator)
    H = rows.T @ rows / d + torch.eye(d)
    V, G = torch.randn(neurons, d, generator=generator), torch.eye(neurons)
    return [V] * layers, [H] * layers, [G] * layers, [torch.arange(d).view(neurons, block)] * layers


def chosen(count, *layers):
    return {"native": lambda: kfac_ext.greedy_selection(*layers, count)}


def test_against_the_direct_algorithm(measure, quick):
    sizes = (16, 64) if quick else (16, 32, 64, 128)
    points = {n: operands(n) for n in sizes}
    direct = {n: lambda n=n: reference.greedy_selection(*points[n], n // 2) for n in sizes}
    variants = {n: {**chosen(n // 2, *points[n]), "direct": direct[n]} for n in sizes}
    measure.growth("half of the channels of a 3x3 layer go", "channels", variants)


@pytest.mark.parametrize("block", [1, 9])
def test_width(measure, quick, block):
    sizes = (64, 128) if quick else (64, 128, 256, 512, 1024, 2048) if block == 1 else (64, 128, 256, 512)
    points = {n: chosen(n // 2, *operands(n, block)) for n in sizes}
    measure.growth(f"half of the neurons go, {block} columns each", "neurons", points)


def test_removals(measure, quick):
    counts = (8, 32) if quick else (8, 16, 32, 64, 128)
    layers = operands(256)
    measure.growth("of 256 channels of a 3x3 layer", "removals", {n: chosen(n, *layers) for n in counts})


def test_consumers(measure, quick):
    counts = (1, 4) if quick else (1, 2, 4, 8, 16)
    points = {n: chosen(32, *operands(64, layers=n)) for n in counts}
    measure.growth("half of 64 channels, read by 3x3 layers", "layers", points)


@pytest.mark.parametrize("name", EVENTS)
def test_first_event(measure, quick, name):
    """To half of the parameters, beside a bare training step in the same process."""
    if quick and name not in QUICK:
        pytest.skip("full runs only")
    torch.manual_seed(0)
    x, y = worksets.batch_of(BATCH, IMAGE)
    trainings = {}

    def fresh():
        model = models.build(name, IMAGE, 10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        curvature = flatprune.Curvature(model)
        for _ in range(2):
            step(model, optimizer)
        options = {"target": flatprune.Target(params=0.5), "total_steps": 1}
        schedule = CubicSchedule(1, start=0.0, end=1.0, every=1)
        trainings["native"] = flatprune.Pruner(model, optimizer, curvature, x[:2], schedule=schedule, **options)

    def step(model, optimizer):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    bare = models.build(name, IMAGE, 10)
    descent = torch.optim.SGD(bare.parameters(), lr=0.01, momentum=0.9)
    variants = {"native": lambda: trainings["native"].step(), "bare step": lambda: step(bare, descent)}
    measure("removal", f"first event to half of {name}", variants, before={"native": fresh}, max_rounds=3)
    assert trainings["native"].history[0].removed
