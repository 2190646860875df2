"""Calibration, corruptions, radii and latency against what they are defined as."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flatprune.data import Normalization, load_dataset
from flatprune.errors import InputError
from flatprune.export import fresh_network, load
from flatprune.models import layer_widths
from flatprune.runs import run
from flatprune.settings import Settings
from flatprune.training.corruptions import KINDS, corrupted
from flatprune.training.evaluation import calibration
from flatprune.training.measurements import hessian_radius, latency, radii_of_both_kinds, valleys
from kfac_ext.curvature import Curvature

PLAIN = Normalization(torch.tensor([0.25]), torch.tensor([0.5]))


def test_calibration_by_hand():
    p = torch.tensor([0.9, 0.9, 0.6, 0.6])  # of class 0, always predicted; right in 1 of 2 and in 2 of 2
    logits = torch.stack([p, 1 - p], 1).log()
    found = calibration(logits, torch.tensor([0, 1, 0, 0]))
    assert found["test_ece"] == pytest.approx(0.5 * abs(0.5 - 0.9) + 0.5 * abs(1.0 - 0.6))
    nll = -(torch.tensor([0.9, 0.1, 0.6, 0.6]).log().mean())
    assert found["test_nll"] == pytest.approx(float(nll), rel=1e-6)


def test_contrast_and_blur_keep_flat_images_and_noise_deviates():
    images = torch.rand(64, 1, 32, 32) * 2 - 0.5  # pixels 0 to 1
    flat = torch.full((1, 1, 32, 32), 0.5)
    for kind in ("blur", "contrast"):
        torch.testing.assert_close(corrupted(flat, PLAIN, kind, 5), flat)
    middle = images * 1e-3
    both = torch.cat([images, middle])  # the range is that of all images
    noise = (corrupted(both, PLAIN, "noise", 1) - both)[64:] * 0.5
    assert float(noise.std()) == pytest.approx(0.04, rel=0.02)
    contrast = corrupted(images, PLAIN, "contrast", 2)
    assert torch.allclose(contrast.std(dim=(1, 2, 3)), 0.5 * images.std(dim=(1, 2, 3)), rtol=1e-4)
    assert torch.allclose(contrast.mean(dim=(1, 2, 3)), images.mean(dim=(1, 2, 3)), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_corruptions_grow_and_repeat(kind):
    images = torch.rand(8, 1, 32, 32) * 2 - 0.5
    sizes = [float((corrupted(images, PLAIN, kind, strength) - images).norm()) for strength in range(1, 6)]
    assert sizes == sorted(sizes) and sizes[0] > 0
    assert torch.equal(corrupted(images, PLAIN, kind, 3), corrupted(images, PLAIN, kind, 3))
    with pytest.raises(ValueError, match="strength is 6"):
        corrupted(images, PLAIN, kind, 6)


def test_radii_differ_with_positions_and_leave_the_model_alone():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    x = torch.randn(32, 1, 8, 8)
    curvature = Curvature(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    found = radii_of_both_kinds(model, curvature, x, seed=0)
    assert found["radius_expand"] == pytest.approx(found["radius_reduce"])  # the largest block is the linear layer
    assert 0 < found["radius_expand_geometric_mean"] != pytest.approx(found["radius_reduce_geometric_mean"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng) and curvature.step_count == 0
    linear = nn.Sequential(nn.Linear(64, 5))
    same = radii_of_both_kinds(linear, Curvature(linear), torch.randn(32, 64), seed=0)
    assert same["radius_expand"] == pytest.approx(same["radius_reduce"], rel=1e-4)


@pytest.mark.parametrize("sharpest, reach", [(8.0, 0.5), (0.0, 1.0), (-3.0, 1.0), (float("nan"), 1.0)])
def test_valleys_reach_as_far_as_the_sharpest_allows(sharpest, reach):
    dataset = load_dataset("digits", train_size=60)
    networks = {name: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for name in ("dense", "pruned")}
    found = valleys(networks, sharpest, dataset, seed=0)
    distances = found.pop("distances")
    assert (distances[0], distances[-1]) == (-reach, reach) and found.keys() == networks.keys()
    for name, losses in found.items():
        middle, step = len(losses) // 2, distances[-1] / (len(losses) // 2)
        curvature = (losses[middle - 1] - 2 * losses[middle] + losses[middle + 1]) / step**2
        assert curvature == pytest.approx(hessian_radius(networks[name], dataset, 0), rel=0.02)


def test_latency_is_an_image_s(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("flatprune.pruning.latency._clock", lambda: now[0])

    class Slow(nn.Module):
        def forward(self, x):
            now[0] += 0.002
            return x

    assert latency(Slow(), torch.zeros(1, 4)) == pytest.approx({1: 2.0, 128: 2.0 / 128})


def test_validation_images_are_those_of_training_for_any_seed():
    whole = load_dataset("digits")
    first, second = (load_dataset("digits", seed=seed, validation=0.2, train_size=0.5) for seed in (0, 1))
    assert len(first.x_test) == round(0.2 * len(whole.x_train))
    assert len(first.x_train) == round(0.5 * (len(whole.x_train) - len(first.x_test)))
    assert torch.equal(first.y_test, second.y_test) and not torch.equal(first.y_train, second.y_train)
    with pytest.raises(InputError, match="validation"):
        load_dataset("digits", validation=0.0001)


def test_the_learning_rate_of_the_classic_pipeline():
    restart = Settings(schedule="restart", prune_start=0.5, prune_end=0.5)
    rates = [restart.learning_rate(step, 100, 0.1) for step in range(100)]
    assert rates[0] == rates[50] == 0.1 and rates[25] == pytest.approx(0.05) and rates[49] < 1e-3 > rates[99]
    tenth = Settings(schedule="finetune", prune_start=0.5, prune_end=0.5)
    assert tenth.learning_rate(50, 100, 0.1) == pytest.approx(0.01)


def test_a_fresh_transformer_begins_as_the_whole_one_does(tmp_path, npz):
    """The positions are a parameter of the network itself, which no `reset_parameters` draws."""
    settings = Settings(
        data=str(npz()),
        model="vit_tiny",
        widths=(32, 16),
        epochs=1,
        batch_size=32,
        target_params=0.6,
        flatness="off",
        track_hessian=0,
    )
    summary = run(settings, tmp_path / "run")
    assert "hessian_lambda_max" not in summary and (tmp_path / "run" / "report.html").is_file()
    trained = load(tmp_path / "run")
    torch.manual_seed(3)
    fresh = fresh_network(tmp_path / "run", {"image_shape": [1, 8, 8], "classes": 4})
    assert layer_widths(fresh) == layer_widths(trained)
    assert fresh.positions.shape == trained.positions.shape and trained.positions.shape[2] < 32
    assert 0.01 < float(fresh.positions.std()) < 0.03 and not torch.equal(fresh.positions, trained.positions)
    assert fresh.positions.requires_grad


def test_a_fresh_network_has_the_widths_of_the_pruned_one(flatprune, tmp_path, npz):
    out = tmp_path / "run"
    network = ("--model", "resnet20", "--widths", "8,8,8")
    options = (*network, "--epochs", 1, "--batch-size", 32, "--target-params", 0.6, "--flatness", "off")
    assert flatprune("run", "--data", npz(), "--out", out, *options, "--measure-latency", "--corruptions").code == 0
    trained = load(out)
    fresh = fresh_network(out, {"image_shape": [1, 8, 8], "classes": 4})
    assert layer_widths(fresh) == layer_widths(trained)
    assert not torch.equal(fresh.fc.weight, trained.fc.weight)
    assert float(fresh.bn.running_mean.abs().sum()) == 0.0
    with pytest.raises(InputError, match="image_shape"):
        fresh_network(out, {"image_shape": [3, 8, 8], "classes": 4})
