"""What the packages of the zoo need to be imported beside a CPU-only torch, and to leave the machine's files alone."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
_MISSING = ("nms", "qnms")  # operators that torchvision's Python code gives meta kernels when it is imported
_library: torch.library.Library | None = None  # the operators vanish with it


def prepare() -> None:
    """Keep everything offline and out of the home directory, and make torchvision importable; call it first of all."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["YOLO_VERBOSE"] = "false"
    os.environ["YOLO_OFFLINE"] = "true"
    os.environ.setdefault("YOLO_CONFIG_DIR", str(ROOT / "build" / "zoo"))
    if find_spec("torchvision") is not None:
        _import_torchvision()


def _import_torchvision() -> None:
    """Import torchvision; the compiled operators of its wheel want a CUDA torch, networks need none of them.

    What takes boxes from a detector's outputs calls `torchvision.ops.nms`, which is made of PyTorch's operators then.
    """
    global _library
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if _library is not None or "torchvision::nms does not exist" not in str(error):
            raise
        _library = torch.library.Library("torchvision", "DEF")
        for name in _MISSING:
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _import_torchvision()
        sys.modules["torchvision.ops"].nms = _nms


def _nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Boxes [n, 4] (x1, y1, x2, y2) that overlap no better one by more than the threshold, the best first; int64."""
    kept: list[Tensor] = []
    left = scores.argsort(descending=True)
    areas = (dets[:, 2:] - dets[:, :2]).prod(dim=1)
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        corners = torch.maximum(dets[best, :2], dets[left, :2]), torch.minimum(dets[best, 2:], dets[left, 2:])
        common = (corners[1] - corners[0]).clamp_min(0).prod(dim=1)
        left = left[common / (areas[best] + areas[left] - common) <= iou_threshold]
    return torch.stack(kept) if kept else scores.new_zeros(0, dtype=torch.int64)
