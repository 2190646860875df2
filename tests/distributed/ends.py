"""Pairs of ranks that end right after a collective, while no thread but the main one gets Python's lock by itself.

python -m tests.distributed.ends PAIRS   # prints the exit statuses that are not 0
"""

import os
import socket
import sys

import torch
import torch.distributed as dist
from torch import nn

from flatprune.training.ranks import joined


def rank(number: int) -> None:
    """Join, make a collective and leave."""
    os.environ["RANK"] = str(number)
    torch.set_num_threads(1)
    sys.setswitchinterval(20.0)
    with joined("cpu"):
        global model
        model = nn.parallel.DistributedDataParallel(nn.Linear(50, 50))
        model(torch.randn(4, 50)).sum().backward()
        dist.all_reduce(torch.ones(1000))


def free_port() -> str:
    """A port that nobody listens to."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def main(pairs: int) -> None:
    """Fork them, one pair after the other."""
    for _ in range(pairs):
        os.environ.update(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
        children = []
        for number in (0, 1):
            child = os.fork()
            if not child:
                rank(number)
                sys.exit(0)
            children.append(child)
        statuses = [os.waitpid(child, 0)[1] for child in children]
        if any(statuses):
            print(statuses, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
