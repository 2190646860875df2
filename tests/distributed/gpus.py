"""What ranks do where there is a GPU."""

import torch
import torch.distributed as dist

from kfac_ext.distributed import Group


def one_by_nccl(port):
    """Every way of a group to talk, of one rank by NCCL: tensors of the host are carried to the GPU and back."""
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"tcp://localhost:{port}", rank=0, world_size=1)
    try:
        group, found = Group(), {}
        for place in ("cpu", "cuda"):
            x = torch.arange(9.0, device=place).view(3, 3)
            matrix = x + x.mT
            found[place] = [
                torch.equal(group.mean([x], "test")[0], x),
                torch.equal(group.mean_of_symmetric([matrix], "test")[0], matrix),
                torch.equal(group.rows_of_all(x, "test"), x),
                torch.equal(group.gathered([0, 0], [x[0], x[1]], [3, 3], x, "test")[1], x[1]),
                group.mean([x], "test")[0].device.type == place,
            ]
        found["objects"] = [group.first("word", "test") == "word", group.everyone(1, "test") == [1]]
        found["flags"] = [group.any(True, "test"), not group.any(False, "test")]
        return found
    finally:
        dist.destroy_process_group()
