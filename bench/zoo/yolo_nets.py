"""Detectors, segmenters and classifiers of ultralytics, nano sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.zoo.network import Builder, Network, images

PACKAGE = "ultralytics.nn.tasks"


def leaves(output: Any) -> Iterator[Tensor]:
    """All tensors of a nested output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for item in output.values():
            yield from leaves(item)
    else:
        for item in output:
            yield from leaves(item)


def raw(output: Any) -> Tensor:
    """What the loss is taken of, before boxes are decoded: all of it as one row [n, numbers]."""
    if isinstance(output, tuple):  # in evaluation mode the decoded boxes come first
        output = output[-1]
    return torch.cat([tensor.flatten(1) for tensor in leaves(output) if tensor.is_floating_point()], 1)


def scores(output: Any) -> Tensor:
    """Logits of a classifier."""
    return output[1] if isinstance(output, tuple) else output


def detector(name: str, kind: str = "DetectionModel", size: int = 64) -> Builder:
    """A model with three classes."""

    def build() -> Network:
        from ultralytics.nn import tasks

        return Network(getattr(tasks, kind)(f"{name}.yaml", nc=3, verbose=False).train(), images(size), raw, "mse")

    return build


def classifier(name: str) -> Builder:
    """A model for ten classes."""

    def build() -> Network:
        from ultralytics.nn import tasks

        model = tasks.ClassificationModel(f"{name}.yaml", nc=10, verbose=False)
        return Network(model.train(), images(64), scores)

    return build


NETWORKS: dict[str, Builder] = {
    "yolo_v5n": detector("yolov5n"),
    "yolo_v8n": detector("yolov8n"),
    "yolo_v9t": detector("yolov9t"),
    "yolo_v10n": detector("yolov10n"),
    "yolo_11n": detector("yolo11n"),
    "yolo_12n": detector("yolo12n"),
    "yolo_v8n_segment": detector("yolov8n-seg", "SegmentationModel"),
    "yolo_11n_pose": detector("yolo11n-pose", "PoseModel"),
    "yolo_v8n_classify": classifier("yolov8n-cls"),
    "yolo_11n_classify": classifier("yolo11n-cls"),
}
