"""Data sets, networks and sizes of the study."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from flatprune import models
from flatprune.data import Dataset, load_dataset

VALIDATION = 0.2  # of the training images; knobs are chosen on them
TARGETS = {  # name -> unit and fraction of the whole network
    "10": ("params", 0.10),
    "5": ("params", 0.05),
    "2": ("params", 0.02),
    "macs10": ("macs", 0.10),
    "macs50": ("macs", 0.50),
    "macs25": ("macs", 0.25),
}
DEFAULT_TARGETS = ("10", "5", "2", "macs10")
_UNITS = {"params": "parameters", "macs": "multiply-accumulates"}
TITLES = {name: f"{100 * fraction:.0f} % of the {_UNITS[unit]}" for name, (unit, fraction) in TARGETS.items()}


@dataclass(frozen=True)
class Task:
    """What is trained on what.

    Attributes:
        title: for people.
        file: of the images, in the folder that is given.
        image_size: images are averaged to it.
        model, widths: of `flatprune.models.build`.
        train_size: images of the training set, drawn by the seed of the run.
        epochs, batch_size: of every method.
        augment: shifts, and mirror images for colour.
        warmup: fraction of the training in which every method's learning rate rises linearly to its own.
        bf16: training forwards in bfloat16 by autocast, of images in channels-last format.
    """

    title: str
    file: str
    image_size: int
    model: str = "convnet"
    widths: tuple[int, ...] | None = None
    train_size: int | None = 5000
    epochs: int = 10
    batch_size: int = 128
    augment: bool = False
    warmup: float = 0.0
    bf16: bool = False

    def data(self, folder: Path, seed: int, *, validation: bool) -> Dataset:
        """The images of a seed; for the choice of knobs a fifth of the training images in place of the test images."""
        return load_dataset(
            self.file if self.file == "digits" else str(folder / self.file),
            seed=seed,
            train_size=self.train_size,
            validation=VALIDATION if validation else None,
            image_size=self.image_size,
        )

    def network(self, data: Dataset) -> nn.Module:
        """The whole network, with fresh weights of torch's global stream."""
        return models.build(self.model, data.image_shape, data.classes, self.widths)


_QUARTER = (4, 8, 16)  # of ResNet-20's channels
TASKS = {
    "fashion": Task("Fashion-MNIST, 5,000 images of 14x14, conv net", "fashion-mnist.npz", 14),
    "cifar": Task("CIFAR-10, 5,000 images of 16x16, conv net", "cifar10.npz", 16),
    "fashion-resnet20": Task(
        "Fashion-MNIST, 5,000 images of 14x14, ResNet-20 of a quarter of its width",
        *("fashion-mnist.npz", 14, "resnet20", _QUARTER),
    ),
    "cifar-resnet20": Task(
        "CIFAR-10, 5,000 images of 16x16, ResNet-20 of a quarter of its width", "cifar10.npz", 16, "resnet20", _QUARTER
    ),
    "cifar-whole": Task(
        "CIFAR-10, all images, ResNet-20, 24 epochs with shifts and mirror images",
        *("cifar10.npz", 32, "resnet20"),
        train_size=None,
        epochs=24,
        augment=True,
        warmup=1 / 24,
        bf16=True,
    ),
}
DEFAULT_TASKS = ("fashion", "cifar")
