"""The record of one training forward, for terms of the loss that are made of what it shows."""

from __future__ import annotations

from torch import Tensor

from kfac_ext.curvature.capture import Capture


class Recorder:
    """Keeps what the next training forward of a `Curvature` shows, once it is asked to.

    Attributes:
        is_asked: whether the next training forward is to be recorded.
        record: that of the last one, until it is taken.
    """

    def __init__(self) -> None:
        self.is_asked = False
        self.record: Capture | None = None

    def ask(self) -> None:
        """Keep what the next training forward shows, for `take`."""
        self.is_asked = True

    def begin(self) -> bool:
        """Whether the forward that begins now is to be recorded; an older record is dropped."""
        asked, self.is_asked, self.record = self.is_asked, False, None
        return asked

    def take(self, output: Tensor) -> Capture | None:
        """The record of the forward that gave this very tensor; None if there is none, or if it ran in autocast."""
        record, self.record = self.record, None
        if record is None or record.autocast or all(tensor is not output for tensor in record.tensors):
            return None
        return record
