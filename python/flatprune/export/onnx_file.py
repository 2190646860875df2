"""The pruned network as an ONNX file: input `images`, output `logits`, any number of images.

Its last bytes are one more entry of `metadata_props`, `flatprune_sha256`: the digest of all bytes before.
"""

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

from flatprune.export.subject import DESCRIPTION_KEY, Subject
from flatprune.extras import needed_by
from flatprune.files.atomic import damaged, read_bytes, sha256

_DIGEST_KEY = b"flatprune_sha256"
_METADATA_FIELD = 14  # of ModelProto; its entries are messages of a key, field 1, and a value, field 2
OPSET = 18  # what torch's exporter writes without a conversion


def write(subject: Subject, path: Path) -> list[Path]:
    """Write the graph with its weights to `path`.

    Raises:
        MissingPackageError: onnx or onnxscript is not installed.
    """
    with needed_by("export to onnx"):
        for package in ("onnx", "onnxscript"):
            importlib.import_module(package)
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
    content = program.model_proto.SerializeToString()
    path.write_bytes(content + _tail(content))
    return [path]


def _tail(content: bytes) -> bytes:
    """The entry with the digest of `content`; protocol buffers may be joined end to end."""
    digest = sha256(content).encode()
    return _field(_METADATA_FIELD, _field(1, _DIGEST_KEY) + _field(2, digest))


def _field(number: int, content: bytes) -> bytes:
    """A field of bytes as protocol buffers are written; numbers below 16, lengths below 128."""
    return bytes([number << 3 | 2, len(content)]) + content


def check(path: Path) -> None:
    """Raise DamagedError where a file is not what `write` wrote; onnx is not needed."""
    content = read_bytes(path)
    length = len(_tail(b""))
    if content[-length:] != _tail(content[:-length]):
        raise damaged(path, "its bytes do not have the SHA-256 at its end")


def reopen(path: Path) -> Callable[[Tensor], Tensor]:
    """What the file computes, in onnxruntime or, where that is missing, in onnx's own reference."""
    try:
        from onnxruntime import InferenceSession

        session = InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        session = ReferenceEvaluator(str(path))
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


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
