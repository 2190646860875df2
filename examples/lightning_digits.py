"""Handwritten digits with Lightning: a conv net loses 70 % of its parameters while it trains; half a minute on a CPU.

pip install '.[cli]' lightning && python examples/lightning_digits.py
"""

import logging

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from flatprune.integrations.lightning import PruningCallback


class Digits(lightning.LightningModule):
    """8 x 8 grey images, ten classes."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((1, 16), (16, 32)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _index: int) -> torch.Tensor:
        """The loss."""
        x, y = batch
        return F.cross_entropy(self.model(x), y)

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], _index: int) -> None:
        """The accuracy."""
        x, y = batch
        self.log("accuracy", (self.model(x).argmax(dim=1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main(epochs: int = 12) -> None:
    """Train, prune, print what is left."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("flatprune").setLevel(logging.INFO)
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    train, test = TensorDataset(x[:1400], y[:1400]), TensorDataset(x[1400:], y[1400:])
    callback = PruningCallback(target=0.3, network="model")
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, callbacks=[callback])
    module = Digits()
    trainer.fit(module, DataLoader(train, 64, shuffle=True), DataLoader(test, 397))
    print(callback.pruning.summary())


if __name__ == "__main__":
    main()
