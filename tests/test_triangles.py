"""Symmetric matrices as the numbers that they have."""

import pytest
import torch

from kfac_ext.triangles import pack_, packed_size, unpacked


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 3), (8, 8), (9, 9), (3, 5, 5), (2, 4, 4), (2, 1, 1)])
def test_unpacked_is_what_was_packed(shape):
    matrix = torch.randn(shape)
    matrix = matrix + matrix.mT
    packed = torch.full((packed_size(shape) + 2,), torch.nan)
    pack_(packed[1:-1], matrix)
    groups = shape[0] if len(shape) == 3 else 1
    assert packed_size(shape) == groups * shape[-1] * (shape[-1] + 1) // 2
    assert packed[[0, -1]].isnan().all() and packed[1:-1].isfinite().all()
    assert torch.equal(unpacked(packed[1:-1], shape), matrix)
    whole = torch.sort(torch.cat([m[tuple(torch.tril_indices(*m.shape))] for m in matrix.view(-1, *shape[-2:])])).values
    assert torch.equal(packed[1:-1].sort().values, whole)  # each number once
