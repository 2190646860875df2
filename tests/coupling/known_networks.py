"""Every network of the tests whose groups are stored, by name, always with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from tests.pruning import pruning_networks, random_networks, shipped_networks, unseen_networks

Built = tuple[nn.Module, tuple[Tensor, ...]]


def _small(build: Callable[[], nn.Module]) -> Built:
    torch.manual_seed(0)
    return build(), (pruning_networks.digits()[0][:2],)


def _unseen(case: unseen_networks.Case) -> Built:
    torch.manual_seed(0)
    model = case.build()
    return model, unseen_networks.inputs_of(case, 2)


def _shipped(name: str) -> Built:
    return shipped_networks.build(name), (shipped_networks.image_batch()[0][:2],)


def _drawn(seed: int) -> Built:
    model, x = random_networks.drawn(seed)
    return model, (x[:2],)


KNOWN_NETWORKS: dict[str, Callable[[], Built]] = {
    **{f"small {name}": partial(_small, build) for name, build in pruning_networks.NETWORKS.items()},
    "small resnet20": partial(_small, pruning_networks.resnet20),
    **{f"unseen {name}": partial(_unseen, case) for name, case in unseen_networks.CASES.items()},
    **{f"shipped {name}": partial(_shipped, name) for name in shipped_networks.WIDTHS},
    **{f"drawn {seed}": partial(_drawn, seed) for seed in range(24)},
}
