"""Lists of symmetric positive definite matrices to test with, and what an error may be."""

from functools import lru_cache

import torch

from tests.conftest import relative_error

SIZES = [1, 2, 15, 16, 17, 31, 33, 64, 129, 300]


def spd(n, dtype=torch.float32, condition=1e3, seed=0, device="cpu"):
    """A random symmetric matrix with eigenvalues from 1 down to 1/condition; the first stands apart."""
    return _spd(n, condition, seed).to(device, dtype, copy=True)


@lru_cache(maxsize=64)
def _spd(n, condition, seed):
    generator = torch.Generator().manual_seed(1000 * seed + n)
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q
    spectrum = torch.logspace(0, -torch.tensor(condition).log10().item(), n, dtype=torch.float64)
    spectrum[1:] *= 0.8
    matrix = (basis * spectrum) @ basis.T
    return (matrix + matrix.T) / 2


def allowed(dtype, plain, exact, floor=2.4e-7):
    """Twice plain PyTorch's error in the same dtype, but a rounding or two (float64's oracle is no better)."""
    return 1e-11 if dtype == torch.float64 else max(2 * relative_error(plain, exact), floor)
