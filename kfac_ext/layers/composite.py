"""Functions of torch that call other operators inside, where a TorchFunctionMode sees nothing of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch.nn.functional as F

SEQUENCE_FIRST = frozenset({F.multi_head_attention_forward})
"""Functions whose first argument, and all rows inside, are [T, N, d]: positions before samples."""


@cache
def opened(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """A function's own code without its look for modes, which sends every call to the mode as a whole; None if not one.

    So the mode that runs it is asked for each operator in it.
    """
    if function not in SEQUENCE_FIRST or not isinstance(function, FunctionType):
        return None
    if "has_torch_function" not in function.__code__.co_names:
        return None
    names = {**function.__globals__, "has_torch_function": lambda *_arguments: False}
    body = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body
