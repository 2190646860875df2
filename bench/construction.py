"""Networks of which a pruner is made, and the peak extra memory of making it, in a process of its own.

python -m bench.construction "ResNet-20"
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatprune
from bench import memory
from bench.zoo.environment import prepare
from flatprune import models


@dataclass
class Subject:
    """A network and a batch.

    Attributes:
        build: makes the network.
        batch: what it is called with in training.
        classes: of its output.
        package: that has to be there; "torch" where that is enough.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[], Tensor]
    classes: int
    package: str = "torch"


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs).logits


def _resnet50() -> nn.Module:
    prepare()
    import transformers

    return _Logits(transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000)))


def _bert_base() -> nn.Module:
    prepare()
    import transformers

    return _Logits(transformers.BertForSequenceClassification(transformers.BertConfig()))


SUBJECTS = {
    "ResNet-20": Subject(lambda: models.build("resnet20", (3, 32, 32), 10), lambda: torch.randn(128, 3, 32, 32), 10),
    "ResNet-50": Subject(_resnet50, lambda: torch.randn(32, 3, 64, 64), 1000, "transformers"),
    "BERT-base": Subject(_bert_base, lambda: torch.randint(5, 1000, (32, 128)), 2, "transformers"),
}


class Construction:
    """A network before a pruner is made of it: that, and one bare training step."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        subject = SUBJECTS[name]
        self.model = subject.build()
        self.batch = subject.batch()
        self.labels = torch.arange(len(self.batch)) % subject.classes
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.curvature = flatprune.Curvature(self.model)

    def step(self) -> None:
        """One training step, without factors."""
        with self.curvature.paused():
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(self.batch), self.labels).backward()
            self.optimizer.step()

    def construct(self) -> Any:
        """The pruner, of one example."""
        target = flatprune.Target(params=0.5)
        return flatprune.Pruner(
            self.model, self.optimizer, self.curvature, self.batch[:1], target=target, total_steps=100
        )


def model_bytes(name: str) -> int:
    """Of the parameters and buffers."""
    model = SUBJECTS[name].build()
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def main(name: str, threads: str = "") -> None:
    """Print the bytes."""
    if threads:
        torch.set_num_threads(int(threads))
    construction = Construction(name)
    print(json.dumps({"bytes": memory.peak_extra(construction.construct)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
