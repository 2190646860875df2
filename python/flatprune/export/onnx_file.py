"""The pruned network as an ONNX file: input `images`, output `logits`, any number of images."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from flatprune.errors import InputError
from flatprune.export.subject import DESCRIPTION_KEY, Subject

OPSET = 18  # what torch's exporter writes without a conversion


def write(subject: Subject, path: Path) -> list[Path]:
    """Write the graph with its weights to `path`.

    Raises:
        InputError: onnx or onnxscript is not installed.
    """
    for package in ("onnx", "onnxscript"):
        _need(package)
    with _quiet():
        program = torch.onnx.export(
            subject.network,
            (subject.images(2),),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("n")},),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # it is None where a path is given
    program.model.metadata_props[DESCRIPTION_KEY] = json.dumps(subject.description())
    path.write_bytes(program.model_proto.SerializeToString())
    return [path]


def reopen(path: Path) -> Callable[[Tensor], Tensor]:
    """What the file computes, in onnxruntime or, where that is missing, in onnx's own reference."""
    try:
        from onnxruntime import InferenceSession

        session = InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        session = ReferenceEvaluator(str(path))
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _need(package: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"export to onnx needs {package} ({error}); pip install 'kfac-ext[export]'") from error


@contextlib.contextmanager
def _quiet():
    # The exporter prints its progress and warns about things of its own that nobody who calls it can change.
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
