"""How long the native kernels take at least, by what their schedules count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from bench.gpu.names import RATES


class Floor(NamedTuple):
    """Multiply-adds, and bytes to and from memory."""

    tf32: float
    """on the matrix units, where tf32 is allowed"""
    float32: float
    """on the matrix units in full precision: three in tf32 for one"""
    plain: float
    """in float32 outside of the matrix units"""
    bytes: float

    def seconds(self, reached: Mapping[str, float], precision: str) -> float:
        """The longest of the three at what a matmul and a copy reach on the device."""
        products = self.tf32 if precision == "tf32" else self.float32
        matrix = 2e-9 * products / reached[RATES["tf32"]]
        plain = 2e-9 * self.plain / reached[RATES["float32"]]
        return max(matrix, plain, 1e-9 * self.bytes / reached["copy_gbs"])


def share(case: Mapping[str, Any], reached: Mapping[str, float]) -> float:
    """The floor over native's time: 1 is as fast as this device can do what the schedule counts."""
    return Floor(**case["floor"]).seconds(reached, case["precision"]) / case["variants"]["native"]["median"]
