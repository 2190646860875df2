"""Forwards that other tools make of a model for their own ends, in which there is nothing to look at."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor


def is_transformed(arguments: Iterable[Any]) -> bool:
    """Whether a forward with these arguments is none of training.

    It is traced (`torch.export`, `torch.jit.trace`), transformed (`torch.func`), or made again inside a backward
    (`torch.utils.checkpoint`), where it has been looked at before.
    """
    if torch.jit.is_tracing() or torch._C._current_graph_task_id() != -1:
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:  # torch keeps it in this place only
        return True
    return any(isinstance(x, FakeTensor) for x in arguments)
