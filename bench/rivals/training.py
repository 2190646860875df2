"""The one training loop of all methods: data, order, batches, evaluation and random streams are the same for each."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.rivals.method import MOMENTUM, WEIGHT_DECAY, Method
from bench.rivals.sizes import Goal
from bench.rivals.tasks import Task
from flatprune.data import Dataset, augmented, batch_indices
from flatprune.errors import DivergedError
from flatprune.models import multiply_accumulates, parameter_count
from flatprune.pruning.learning_rate import warmup_factor
from flatprune.training.builders import parameter_groups
from flatprune.training.evaluation import accuracy, calibration, predictions
from kfac_ext.curvature.modes import module_modes

EXAMPLES = 2  # inputs that the methods trace the network with
LATENCY_BATCHES = (1, 128)
_WARM_UP, _REPEATS, _SECONDS = 3, 30, 1.0


class Training:
    """A network, its optimizer, and a method that acts on them; the user's loop.

    Args:
        task: data and network.
        data: of the seed.
        method: called along the way.
        unit, fraction: the size to end with, see `Goal`.
        seed: of the weights and of the order of the images.
        model: the network to train; None: the whole one of the task, fresh.

    Attributes:
        model, optimizer: as they are now; methods replace them.
        goal, target_cost: the size to end with.
        step, total_steps: optimizer steps done, and of the whole training.
        attributes: numbers that the final network's code holds, where others train its shape; else None.
    """

    def __init__(
        self,
        task: Task,
        data: Dataset,
        method: Method,
        unit: str,
        fraction: float,
        seed: int,
        model: nn.Module | None = None,
    ) -> None:
        torch.manual_seed(seed)
        whole = task.network(data)
        self.task, self.data, self.method, self.seed = task, data, method, seed
        self.model = whole if model is None else model
        self.goal = Goal(unit, fraction, data.x_train[:EXAMPLES])
        self.target_cost = fraction * self.goal.cost(whole)
        self.step, self.epochs = 0, task.epochs * method.epochs
        self.total_steps = self.epochs * (len(data.x_train) // min(task.batch_size, len(data.x_train)))
        self.attributes: dict[str, Any] | None = None
        self._uncounted = [0.0, 0.0]
        self.renew_optimizer()

    def renew_optimizer(self, weight_decay: float = WEIGHT_DECAY) -> None:
        """SGD with momentum for the parameters as they are now, without gradients; biases and norms do not decay."""
        self.model.zero_grad()
        groups = parameter_groups(self.model, weight_decay)
        self.optimizer: Any = torch.optim.SGD(groups, lr=self.method.lr, momentum=MOMENTUM)

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Time that is no part of the method: what makes sizes equal."""
        start = _clocks()
        yield
        self._uncounted = [old + now - then for old, now, then in zip(self._uncounted, _clocks(), start)]

    def train(self) -> dict[str, float]:
        """All epochs.

        Returns:
            `seconds`: of the training on the CPU (one thread); `seconds_wall`: by the clock.

        Raises:
            DivergedError: the loss is no number.
        """
        generator = torch.Generator().manual_seed(self.seed)
        start = _clocks()
        self.method.begin(self)
        for _ in range(self.epochs):
            order = torch.randperm(len(self.data.x_train), generator=generator)
            for index in batch_indices(order, self.task.batch_size):
                x = self.data.x_train[index]
                self._one_step(augmented(x, generator) if self.task.augment else x, self.data.y_train[index])
        self.method.finish(self)
        spent = [now - then - left for now, then, left in zip(_clocks(), start, self._uncounted)]
        return {"seconds": spent[0], "seconds_wall": spent[1]}

    def _one_step(self, x: Tensor, y: Tensor) -> None:
        rate = self.method.lr * self.method.rate(self.step / self.total_steps)
        rate *= warmup_factor(self.step, self.total_steps, self.task.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()  # libraries trace networks in evaluation mode and leave them so
        if self.task.bf16:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.task.bf16):
            outputs = self.model(x)
        outputs = outputs.float()
        loss = self.method.loss(self, x, outputs, F.cross_entropy(outputs, y))
        if not math.isfinite(loss.item()):
            raise DivergedError(f"the loss is {loss.item()} at step {self.step + 1} of {self.total_steps}")
        self.optimizer.zero_grad()
        loss.backward()
        self.method.before_step(self)
        self.optimizer.step()
        self.step += 1
        self.method.after_step(self)

    def figures(self) -> dict[str, float]:
        """Accuracies in percent, calibration, sizes and latency of the network as it is now.

        Raises:
            DivergedError: the network's outputs are no numbers.
        """
        data, model = self.data, self.model
        logits = predictions(model, data.x_test)
        if not bool(torch.isfinite(logits).all()):
            raise DivergedError("the network's outputs are not finite")
        found = {
            "accuracy": accuracy(logits, data.y_test),
            "train_accuracy": accuracy(predictions(model, data.x_train), data.y_train),
            **{key.removeprefix("test_"): value for key, value in calibration(logits, data.y_test).items()},
            "params": parameter_count(model),
            "macs": multiply_accumulates(model, data.x_test[:1]),
            "target_cost": self.target_cost,
        }
        return found | {f"latency_{size}": latency(model, data.x_test[:size]) for size in LATENCY_BATCHES}


def _clocks() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


@torch.no_grad()
def latency(model: nn.Module, x: Tensor) -> float:
    """Milliseconds of one forward in evaluation mode: the median over repeats, of the CPU's own time.

    On one thread that is the time by the clock of an idle machine, also where others work on this one.
    """
    times: list[float] = []
    with module_modes(dict.fromkeys(model.modules(), False)):
        for _ in range(_WARM_UP):
            model(x)
        while len(times) < _REPEATS and sum(times) < _SECONDS:
            start = time.thread_time()
            model(x)
            times.append(time.thread_time() - start)
    return 1000.0 * statistics.median(times)


def reset_peak_rss() -> None:
    """Let the system forget the most memory that this process ever had, where it can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def rss_mib(kind: str) -> float | None:
    """Memory of this process in MiB: "VmRSS" now, "VmHWM" the most since `reset_peak_rss`; None where it is unknown."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{kind}:")), None)
