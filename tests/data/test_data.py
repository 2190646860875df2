from __future__ import annotations

import numpy as np
import pytest
import torch

from flatprune.data import augmented, batch_indices, load_dataset, noisy_labels, read_images
from flatprune.errors import InputError


def test_digits_split_is_fixed_and_stratified():
    first, second = load_dataset("digits", seed=0), load_dataset("digits", seed=5)
    assert torch.equal(first.x_test, second.x_test) and torch.equal(first.x_train, second.x_train)
    assert first.image_shape == (1, 8, 8) and first.classes == 10
    fraction = torch.bincount(first.y_test) / (torch.bincount(first.y_train) + torch.bincount(first.y_test))
    assert float(fraction.min()) > 0.23 and float(fraction.max()) < 0.27


def test_normalization_is_that_of_the_training_images(npz):
    path = npz(shape=(8, 10, 3))
    dataset = load_dataset(str(path))
    x = dataset.x_train.double()
    assert dataset.image_shape == (3, 8, 10)
    assert x.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    assert (x.std(dim=(0, 2, 3), correction=0) - 1).abs().max() < 1e-5
    images = read_images(str(path))
    pixels = images.x_test.transpose(0, 3, 1, 2) / 255.0
    mean = (images.x_train / 255.0).mean(axis=(0, 1, 2))[None, :, None, None]
    std = (images.x_train / 255.0).std(axis=(0, 1, 2))[None, :, None, None]
    np.testing.assert_allclose(dataset.x_test.numpy(), (pixels - mean) / std, atol=1e-4)
    assert torch.equal(dataset.normalization(images.x_test), dataset.x_test)


def test_image_size_averages_areas(npz):
    path = npz(shape=(8, 8, 1))
    images = read_images(str(path)).x_train.astype(np.float64) / 255.0
    small = images.reshape(96, 4, 2, 4, 2).mean(axis=(2, 4))
    dataset = load_dataset(str(path), image_size=4)
    assert dataset.image_shape == (1, 4, 4)
    np.testing.assert_allclose(dataset.x_train[:, 0].numpy(), (small - small.mean()) / small.std(), atol=1e-4)


def test_train_size_is_a_random_subset_by_seed(npz):
    path = str(npz())
    whole = {tuple(x.flatten().tolist()) for x in read_images(path).x_train}
    first, again, other = (load_dataset(path, train_size=40, seed=seed) for seed in (0, 0, 1))
    assert len(first.x_train) == len(first.y_train) == 40
    assert torch.equal(first.x_train, again.x_train) and first.digest == again.digest
    assert not torch.equal(first.x_train, other.x_train)
    back = (first.x_train * first.normalization.std + first.normalization.mean) * 255.0
    drawn = [tuple(x.round().int().flatten().tolist()) for x in back]
    assert len(set(drawn)) == 40 and set(drawn) <= whole


def test_label_noise_redraws_a_fraction():
    labels = torch.arange(10).repeat(2000)
    noisy = noisy_labels(labels, 10, 0.4, torch.Generator().manual_seed(0))
    fraction = float((noisy != labels).float().mean())  # nine in ten of those redrawn differ
    assert abs(fraction - 0.36) < 0.01
    assert torch.equal(noisy, noisy_labels(labels, 10, 0.4, torch.Generator().manual_seed(0)))
    assert not torch.equal(noisy, noisy_labels(labels, 10, 0.4, torch.Generator().manual_seed(1)))
    counts = torch.bincount(noisy[noisy != labels], minlength=10).float()
    assert float(counts.min() / counts.max()) > 0.85
    assert torch.equal(labels, torch.arange(10).repeat(2000))
    assert torch.equal(noisy_labels(labels, 10, 0.0, torch.Generator()), labels)


def test_labels_at_every_place(npz):
    y = np.arange(96 * 6).reshape(96, 2, 3) % 5
    data = load_dataset(str(npz(y_train=y, y_test=y[:48])), label_noise=0.5)
    assert data.classes == 5 and data.y_test.shape == (48, 2, 3)
    assert abs(float((data.y_train != torch.from_numpy(y)).float().mean()) - 0.4) < 0.06  # four in five differ
    y[3, 1, 2] = -1
    with pytest.raises(InputError, match=r"y_train has label -1 at index \(3, 1, 2\)"):
        load_dataset(str(npz(y_train=y, y_test=y[:48])))
    with pytest.raises(InputError, match=r"y_train has shape \(96, 0\), expected \[n\], or"):
        load_dataset(str(npz(y_train=y[:, 0, :0])))


def test_label_noise_leaves_the_test_labels(npz):
    path = str(npz())
    clean, noisy = load_dataset(path), load_dataset(path, label_noise=1.0)
    assert torch.equal(clean.y_test, noisy.y_test)
    assert not torch.equal(clean.y_train, noisy.y_train)


def test_float_and_grey_images_without_a_channel_are_taken(npz):
    arrays = np.load(npz("whole.npz"))
    floats = {key: (arrays[key][..., 0] / 255.0).astype(np.float64) for key in ("x_train", "x_test")}
    dataset, whole = load_dataset(str(npz("floats.npz", **floats))), load_dataset(str(npz("whole.npz")))
    assert torch.allclose(dataset.x_train, whole.x_train, atol=1e-5)


def test_batches_are_equal_and_go_on_where_they_stopped():
    order = torch.randperm(100)
    batches = list(batch_indices(order, 32))
    assert [len(batch) for batch in batches] == [32, 32, 32]
    assert torch.equal(torch.cat(batches), order[:96])
    assert torch.equal(next(iter(batch_indices(order, 32, start=2))), batches[2])
    assert [len(batch) for batch in batch_indices(order, 1000)] == [100]


@pytest.mark.parametrize("channels", [1, 3])
def test_augmented_images_are_shifted_and_mirrored(channels):
    x = torch.rand(64, channels, 8, 8)
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for image, result in zip(x, augmented(x, generator)):
        padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
        candidates = {
            (dy, dx, mirrored): (window.flip(2) if mirrored else window)
            for dy in range(3)
            for dx in range(3)
            for window in [padded[:, dy : dy + 8, dx : dx + 8]]
            for mirrored in ((False, True) if channels == 3 else (False,))
        }
        found = [key for key, candidate in candidates.items() if torch.equal(candidate, result)]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) > (12 if channels == 3 else 7)
