"""What the rules of operators see of the forward that is traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from flatprune.coupling.findings import AxisTable, Findings
from flatprune.coupling.values import Value


class Labels(Protocol):
    """The labels of all tensors of one forward; `flatprune.coupling.tracer.Tracer` keeps them.

    Attributes:
        table: the axes of the model.
        findings: what rules find out goes there.
    """

    table: AxisTable
    findings: Findings

    @property
    def here(self) -> str:
        """The module that is running."""

    @property
    def where(self) -> str:
        """The operator and the module that calls it, as messages name them."""

    def get(self, tensor: Tensor) -> Value:
        """What is known of a tensor."""

    def parameter_key(self, tensor: Tensor) -> int | None:
        """The id of the parameter or buffer that this tensor is, or None."""

    def note_view(self, view: Tensor, base: Tensor, value: Value, take: Callable[[Tensor], Tensor]) -> None:
        """`view` shares memory with `base`, whose value is `value`."""
