"""How time grows with the batch, the channels, the image and the number of layers: slopes in a log-log fit."""

import torch

import kfac_ext
from bench import baselines, worksets
from bench.worksets import conv


def covariance_variants(layers):
    inputs = [worksets.activation(layer) for layer in layers]
    averages = [torch.zeros(layer.patch, layer.patch) for layer in layers]
    return {
        "native": lambda: [
            kfac_ext.conv2d_covariance_(A, x, layer.kernel, **layer.geometry)
            for A, x, layer in zip(averages, inputs, layers)
        ],
        "unfold": lambda: [baselines.unfold_covariance(x, layer) for x, layer in zip(inputs, layers)],
    }


def covariance_growth(measure, name, along, layers):
    measure.growth(name, along, {x: covariance_variants(found) for x, found in layers.items()})


def test_batch(measure, quick):
    sizes = (16, 64) if quick else (8, 16, 32, 64, 128, 256)
    covariance_growth(measure, "A, 64 channels @16", "batch", {n: [conv("", n, 64, 64, 16)] for n in sizes})


def test_channels(measure, quick):
    sizes = (32, 128) if quick else (16, 32, 64, 128, 256, 512)
    covariance_growth(measure, "A, @8, batch 32", "channels", {c: [conv("", 32, c, c, 8)] for c in sizes})


def test_image(measure, quick):
    sizes = (8, 16) if quick else (4, 8, 16, 32, 64)
    covariance_growth(measure, "A, 32 channels, batch 16", "image side", {s: [conv("", 16, 32, 32, s)] for s in sizes})


def test_layers(measure, quick):
    counts = (4, 16) if quick else (4, 8, 16, 32, 64)
    covariance_growth(measure, "A, 32 channels @8", "layers", {n: [conv("", 32, 32, 32, 8)] * n for n in counts})


def matrices_of(count, n):
    generator = torch.Generator().manual_seed(n)
    rows = torch.randn(2 * n, n, generator=generator) + 1
    return [(rows.T @ rows / len(rows)).clone() for _ in range(count)]


def inverse_variants(matrices):
    return {
        "native": lambda: kfac_ext.damped_inverse(matrices, 0.01),
        "cholesky": lambda: baselines.cholesky_inverses(matrices, 0.01),
    }


def power_variants(matrices):
    vectors = [torch.ones(len(m)) / len(m) ** 0.5 for m in matrices]
    return {
        "native": lambda: kfac_ext.power_iteration(matrices, vectors, tol=0, max_iter=5),
        "loop": lambda: baselines.power_loop(matrices, vectors, 0, 5),
    }


def test_matrix_size(measure, quick):
    sizes = (64, 256) if quick else (32, 64, 128, 256, 512, 1024)
    measure.growth("inverses of 4 matrices", "n", {n: inverse_variants(matrices_of(4, n)) for n in sizes})


def test_power_size(measure, quick):
    sizes = (64, 256) if quick else (32, 64, 128, 256, 512, 1024)
    measure.growth("5 power steps of 4 matrices", "n", {n: power_variants(matrices_of(4, n)) for n in sizes})


def test_matrix_count(measure, quick):
    counts = (4, 16) if quick else (4, 8, 16, 32, 64)
    measure.growth("inverses, n = 144", "matrices", {k: inverse_variants(matrices_of(k, 144)) for k in counts})


def test_power_count(measure, quick):
    counts = (4, 16) if quick else (4, 8, 16, 32, 64)
    measure.growth("5 power steps, n = 144", "matrices", {k: power_variants(matrices_of(k, 144)) for k in counts})
