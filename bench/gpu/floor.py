"""How long the native kernels take at least, by what their schedules count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from bench.gpu.names import PRECISIONS


class Floor(NamedTuple):
    """Multiply-adds, and bytes to and from memory."""

    tf32: float
    """on the matrix units, where tf32 is allowed"""
    float32: float
    """on the matrix units in full precision: three in tf32 for one"""
    plain: float
    """in float32 outside of the matrix units"""
    bytes: float

    def milliseconds(self, reached: Mapping[str, float], precision: str) -> float:
        """The longest of the three at what a matmul and a copy reach on the device."""
        products = self.tf32 if precision == "tf32" else self.float32
        matrix = 2e-9 * products / reached["matmul_tf32_tflops"]
        plain = 2e-9 * self.plain / reached["matmul_float32_tflops"]
        return max(matrix, plain, 1e-6 * self.bytes / reached["copy_gbs"])


def shares(entry: Mapping[str, Any], reached: Mapping[str, float]) -> dict[str, float]:
    """The floor over native's time in each precision: 1 is as fast as this device can do what the schedule counts."""
    floor = Floor(**entry["floor"])
    return {name: floor.milliseconds(reached, name) / entry[name]["ms"]["native"]["median"] for name in PRECISIONS}
