"""`pruning.pt` of a trainer's checkpoint, missing, damaged, of another kind."""

import pytest
import torch

from flatprune.errors import DamagedError, InputError
from flatprune.files.sealed import save_sealed
from flatprune.integrations.state_file import STATE_FILE, load_state, save_state


def test_it_comes_back_with_what_is_beside_it(tmp_path):
    save_state(tmp_path, {"step": 3, "factors": torch.ones(2)}, epoch=4)
    found = load_state(tmp_path, "PruningTrainer")
    assert found["epoch"] == 4 and found["pruning"]["step"] == 3
    assert torch.equal(found["pruning"]["factors"], torch.ones(2))


def test_what_cannot_be_used_is_named(tmp_path):
    with pytest.raises(InputError, match=r"pruning\.pt: no such file; was the checkpoint .* made by PruningTrainer"):
        load_state(tmp_path, "PruningTrainer")
    save_state(tmp_path, {"step": 3})
    data = bytearray((tmp_path / STATE_FILE).read_bytes())
    data[len(data) // 2] ^= 16
    (tmp_path / STATE_FILE).write_bytes(data)
    with pytest.raises(DamagedError, match=r"pruning\.pt"):
        load_state(tmp_path, "PruningTrainer")
    save_sealed(tmp_path / STATE_FILE, {"format": "flatprune-shapes", "version": 1})
    with pytest.raises(InputError, match="expected 'flatprune-pruning'"):
        load_state(tmp_path, "PruningTrainer")
