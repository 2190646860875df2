import pytest
import torch


@pytest.fixture
def poisoned():
    """What is allocated holds NaN (or the largest integer) until it is written: torch fills it in this mode."""
    torch.use_deterministic_algorithms(True)
    assert bool(torch.empty(3).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)
