"""The compiled module. Pointers are `Tensor.data_ptr()`; numbers are checked, not where pointers lead."""

from collections.abc import Sequence
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
def plan_cache() -> tuple[int, int]: ...
def covariance_work(shape: list[int]) -> tuple[list[float], list[float]]: ...

covariance_weights: dict[str, tuple[list[float], list[float]]]

class CovarianceGroup:
    workspace_bytes: int
    def __init__(
        self,
        problems: Sequence[tuple[int, Sequence[int], Sequence[int], bool, int, bool, int]],
        least_wide_tiles: int = ...,
    ) -> None: ...
    def descriptors(self) -> bytes: ...
    def counts(self) -> dict[str, float]: ...

max_group_layers: int

def covariance_cuda(
    group: CovarianceGroup,
    descriptors: int,
    workspace: int,
    images: list[int],
    outs: list[int],
    decays: list[float],
    scales: list[float],
    device: int,
    stream: int,
) -> None: ...
def greedy_remove_cpu(
    layers: Sequence[tuple[list[int], list[list[int]]]], dtype: int, threads: int
) -> list[tuple[int, float, int, int, int]]: ...
def greedy_floats(layers: Sequence[tuple[list[int], list[list[int]]]]) -> int: ...

max_greedy_block: int

def greedy_remove_cuda(
    layers: Sequence[tuple[list[int], list[list[int]]]],
    workspace: int,
    changes: int,
    failures: int,
    device: int,
    stream: int,
) -> None: ...

class PowerGroup:
    workspace_bytes: int
    def __init__(self, shapes: Sequence[tuple[int, int]], blocks: int, shared_bytes: int) -> None: ...
    def counts(self) -> dict[str, float]: ...
    def descriptors(self) -> bytes: ...

max_power_matrices: int

def power_fits(n: int, shared_bytes: int) -> bool: ...
def power_iteration_device(device: int) -> tuple[int, int]: ...
def power_iteration_cuda(
    group: PowerGroup,
    descriptors: int,
    workspace: int,
    matrices: list[int],
    vectors: list[int],
    tol: float,
    max_iter: int,
    results: list[int],
    device: int,
    stream: int,
) -> None: ...

class CovariancePowerGroup:
    workspace_bytes: int
    blocks: int
    def __init__(self, dtype: int, strides: Sequence[int], shape: Sequence[int], bias: bool, blocks: int) -> None: ...

def covariance_power_blocks(n: int, device: int) -> int: ...
def covariance_power_iteration_cuda(
    group: CovariancePowerGroup,
    image: int,
    vector: int,
    workspace: int,
    tol: float,
    max_iter: int,
    results: list[int],
    device: int,
    stream: int,
) -> None: ...

class InverseGroup:
    workspace_bytes: int
    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None: ...
    def counts(self) -> dict[str, float]: ...
    def descriptors(self) -> bytes: ...

max_inverse_matrices: int
max_pi_pairs: int

def damped_inverse_cuda(
    group: InverseGroup,
    descriptors: int,
    workspace: int,
    pointers: list[tuple[int, int, int]],
    amounts: int,
    info: int,
    device: int,
    stream: int,
) -> None: ...
def pi_damping_cuda(
    pairs: Sequence[tuple[int, int, int, int, int, int, int, int]],
    damping: float,
    amounts: int,
    device: int,
    stream: int,
) -> None: ...

class SaliencyGroup:
    def __init__(self, layers: Sequence[tuple[int, int, int, int, int, int]]) -> None: ...
    def counts(self) -> dict[str, float]: ...
    def descriptors(self) -> bytes: ...

max_saliency_layers: int
max_saliency_block: int

def saliency_cuda(
    group: SaliencyGroup,
    descriptors: int,
    pointers: list[tuple[int, int, int, int]],
    obs: bool,
    flags: int,
    device: int,
    stream: int,
) -> None: ...

cuda_compiler: str

def cuda_architectures() -> list[str]: ...
def cuda_device_problem(device: int) -> str: ...
def cuda_kernels() -> list[tuple[str, int, int]]: ...
def build_directory() -> str: ...
def __getattr__(name: str) -> Any: ...
