"""The test of a network that a run has saved."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from flatprune.data import Images, read_images
from flatprune.errors import InputError
from flatprune.export import load
from flatprune.runs import SUMMARY_FILE
from flatprune.training.evaluation import evaluate


def accuracy_of_saved(folder: Path, data: str | None, device: torch.device) -> tuple[float, float, int]:
    """Accuracy in percent, mean cross entropy, and number of the test images.

    Args:
        folder: of a finished run.
        data: "digits" or the path of an .npz file; None: the data of the run.
        device: where to compute.

    Raises:
        InputError: there is no such folder or network, or the images do not fit it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    network = load(folder, device)
    if data is None:
        summary = folder / SUMMARY_FILE
        if not summary.is_file():
            raise InputError(f"{folder}: has no {SUMMARY_FILE}; name the data with --data")
        data = str(json.loads(summary.read_text())["data"])
    x, y = _test_tensors(data, network, read_images(data))
    return *evaluate(network, x.to(device), y.to(device)), len(y)


def _test_tensors(data: str, network: nn.Module, images: Images) -> tuple[Tensor, Tensor]:
    """The test images as the network takes them, and their labels, once both are known to fit it."""
    channels, height, width = network.image_shape  # type: ignore[misc]
    x = network.normalization(images.x_test)  # type: ignore[operator]
    if tuple(x.shape[1:]) != (channels, height, width):
        shape = "x".join(str(side) for side in images.x_test.shape[1:])
        raise InputError(f"{data}: x_test has images of {shape}, the network takes {height}x{width}x{channels}")
    if images.y_test.max() >= network.classes:  # type: ignore[operator]
        raise InputError(f"{data}: y_test has label {images.y_test.max()}, the network knows {network.classes} classes")
    return x, torch.from_numpy(images.y_test)
