"""Greedy selection: how its time grows with the width, the removals and the layers."""

import pytest
import torch

import kfac_ext
from kfac_ext import reference


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
