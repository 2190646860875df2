"""OTO with its optimizer HESSO: redundant groups are driven to zero, a smaller network is built at the end.

Source: Chen et al. 2021 (arXiv 2107.07467) and 2023 (OTOv2, ICLR), only-train-once 3.0.1. Settings of the authors'
tutorial "ResNet18 on CIFAR10" and their tutorials/README.md: the hyperparameters of the baseline's optimizer (SGD,
momentum, weight decay, learning rate), pruning from 1/10 of the steps, for 1/4 of them, in 10 periods, at the full
learning rate, which decays after it. They give a ratio of groups; here, at each period, a copy tells how many of the
groups that HESSO ranks lowest have to go in all for the size, and its remaining periods share them equally, as HESSO
does.

The release neither imports with torch 2.13, which moved what it asks for, nor runs without a GPU, as it calls
`.cuda()`: `_make_usable` puts both right and changes nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import tempfile
from typing import Any

import torch

from bench.rivals.method import MOMENTUM, WEIGHT_DECAY, Method, cosine
from bench.rivals.sizes import bisected
from bench.rivals.training import Training

START, DURATION, PERIODS = 0.1, 0.25, 10


class OTO(Method):
    """HESSO in place of the optimizer."""

    title = "OTO, HESSO"
    source = "Chen et al. 2021, arXiv 2107.07467; ICLR 2023; tutorial ResNet18 on CIFAR10"
    package, distribution = "only_train_once", "only-train-once"
    options: dict[str, Any] | None = None  # of `OTO.hesso`, instead of all that is chosen here

    def rate(self, progress: float) -> float:
        """Constant until the last period ends, then a cosine."""
        return cosine((progress - START - DURATION) / (1.0 - START - DURATION))

    def begin(self, run: Training) -> None:
        """The graph of the network, and the optimizer."""
        _make_usable()
        import only_train_once

        options = self.options or {
            "variant": "sgd",
            "lr": self.lr,
            "first_momentum": MOMENTUM,
            "weight_decay": WEIGHT_DECAY,
            "target_group_sparsity": 0.5,  # replaced at each period
            "start_pruning_step": round(START * run.total_steps),
            "pruning_steps": round(DURATION * run.total_steps),
            "pruning_periods": PERIODS,
        }
        with _quiet():
            self.library = only_train_once.OTO(model=run.model, dummy_input=run.goal.example[:1])
            run.optimizer = self.hesso = self.library.hesso(**options)
        self.library._optimizer = None  # a copy of the graph is to be small
        if self.options is None:
            self._identify, self.hesso.identify_redundant_groups = self.hesso.identify_redundant_groups, self._plan
            self.run = run

    def _plan(self) -> None:
        """At the start of a period, once all groups have their scores: how many of them go in it."""
        hesso = self.hesso
        order = torch.argsort(torch.cat(hesso.global_scores)).tolist()
        gone = len(hesso.pruned_group_idxes)
        with self.run.uncounted():
            count = bisected(lambda n: self._cost(order[:n]), gone, len(order) - 1, self.run.target_cost)
        hesso.target_num_redundant_groups = count
        left = hesso.pruning_periods - hesso.curr_pruning_period
        hesso.active_num_redundant_groups[hesso.curr_pruning_period] = (
            (count - gone) // left if left > 1 else count - gone
        )
        self._identify()

    def _cost(self, redundant: list[int]) -> int:
        """What the network costs without these groups; HESSO leaves each layer one at least."""
        library = copy.deepcopy(self.library)
        for group, own in zip(library._graph.get_param_groups(), self.hesso.param_groups):
            if not own["is_prunable"] or own["is_auxiliary"]:
                continue
            first = own["global_start_idx"]
            rows = [index - first for index in redundant if first <= index < first + own["num_groups"]]
            for parameter in group["params"]:
                parameter.data[rows[: own["num_groups"] - 1]] = 0.0
        return self.run.goal.cost(_built(library))

    def finish(self, run: Training) -> None:
        """The smaller network."""
        run.model = _built(self.library)


def _built(library: Any) -> Any:
    with tempfile.TemporaryDirectory(prefix="oto-") as folder, _quiet():
        library.construct_subnet(out_dir=folder)
        return torch.load(library.compressed_model_path, weights_only=False)


@contextlib.contextmanager
def _quiet() -> Any:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _make_usable() -> None:
    from torch.onnx._internal.torchscript_exporter import _globals, utils

    sys.modules.setdefault("torch.onnx._globals", _globals)
    torch.onnx._optimize_graph = utils._optimize_graph  # type: ignore[attr-defined]
    if not torch.cuda.is_available():
        torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]


METHODS = {"oto": OTO}
