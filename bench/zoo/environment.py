"""What the packages of the zoo need to be imported beside a CPU-only torch, and to leave the machine's files alone."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
_MISSING = ("nms", "qnms")  # operators that torchvision's Python code gives meta kernels when it is imported
_library: torch.library.Library | None = None  # the operators vanish with it


def prepare() -> None:
    """Keep everything offline and out of the home directory, and make torchvision importable; call it first of all."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["YOLO_VERBOSE"] = "false"
    os.environ.setdefault("YOLO_CONFIG_DIR", str(ROOT / "build" / "zoo"))
    if find_spec("torchvision") is not None:
        _import_torchvision()


def _import_torchvision() -> None:
    """Import torchvision; the compiled operators of its wheel want a CUDA torch, networks need none of them."""
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
