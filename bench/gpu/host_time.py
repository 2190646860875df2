"""The host's part of an update of all factors on a GPU, launches doing nothing: `python -m bench.gpu.host_time`.

Needs no GPU: CPU tensors go the way that CUDA tensors go, up to the launch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from bench import worksets
from bench.gpu.covariance import Covariances
from bench.timing import Alternation
from kfac_ext.ops import _covariance_kernels, covariance_group

_ROUNDS = 200


@contextmanager
def no_launches() -> Iterator[None]:
    """CPU tensors go the way of CUDA tensors, and no kernel runs."""
    compiled = _covariance_kernels._C
    idle: Any = SimpleNamespace(
        CovarianceGroup=compiled.CovarianceGroup,
        max_group_layers=compiled.max_group_layers,
        covariance_cuda=lambda *arguments: None,
    )
    kept: Any = covariance_group._plans
    with (
        patch.object(_covariance_kernels, "_C", idle),
        patch.object(covariance_group, "_joins_group", lambda x: True),
    ):
        kept.cache_clear()
        yield
    kept.cache_clear()


def milliseconds(layers: list[worksets.LayerShape]) -> float:
    """The median of one call of `FactorSet.accumulate_`."""
    work = Covariances(layers, torch.device("cpu"))
    updates = work.updates()
    call = Alternation({"call": lambda: work.factors.accumulate_(updates)})
    with no_launches():
        call.rounds(_ROUNDS, math.inf)
    return 1e3 * statistics.median(call.samples["call"].wall)


def main() -> None:
    """Print a line for each network."""
    torch.set_num_threads(1)
    for name, layers in {"ResNet32": worksets.resnet(2, 5), "VGG19": worksets.vgg(2, worksets.VGG19)}.items():
        print(f"{name}: {milliseconds(layers):.2f} ms for {2 * len(layers)} updates")


if __name__ == "__main__":
    main()
