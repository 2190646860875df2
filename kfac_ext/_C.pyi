"""The compiled module. Pointers are `Tensor.data_ptr()`; nothing is checked here."""

from typing import Any

def cpu_info() -> dict[str, str]: ...
def covariance_cpu(
    image: int,
    dtype: int,
    strides: list[int],
    shape: list[int],
    reduce: bool,
    algorithm: int,
    bias: bool,
    decay: float,
    scale: float,
    out: int,
    threads: int,
) -> None: ...
def covariance_costs(shape: list[int]) -> tuple[float, float]: ...
def __getattr__(name: str) -> Any: ...
