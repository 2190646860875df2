"""Optimizers as people have them: one or several, wrapped, one a parameter; and which parameters they hold."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_NAMED = 3  # parameters that a message names


def as_optimizers(given: Any, argument: str = "optimizer") -> tuple[torch.optim.Optimizer, ...]:
    """All optimizers in what was given, those inside a wrapper (Lookahead, say) too, once each.

    An optimizer is whatever has `param_groups` and `state`.

    Args:
        given: None, an optimizer, a list or tuple of them, or a dict whose values they are (such as
            {parameter: optimizer} of those that step in the backward).
        argument: what a message calls it.

    Raises:
        TypeError: something among them is no optimizer.
        ValueError: LBFGS, whose history is of all parameters in one piece.

    Example:
        >>> as_optimizers([torch.optim.Muon(matrices), torch.optim.AdamW(others)])
    """
    if isinstance(given, (list, tuple)):
        items = {f"[{number}]": item for number, item in enumerate(given)}
    elif isinstance(given, Mapping):
        items = {f"[{number}]": item for number, item in enumerate(given.values())}
    else:
        items = {} if given is None else {"": given}
    found: dict[int, Any] = {}
    for place, item in items.items():
        if not _is_optimizer(item):
            raise TypeError(f"{argument}{place} is {type(item).__name__}, expected {_wanted(item)}")
        for optimizer in _with_wrapped(item):
            if isinstance(optimizer, torch.optim.LBFGS):
                raise ValueError(
                    f"{argument}{place} is LBFGS: it keeps its history of all parameters in one piece, which cannot be "
                    "cut; prune with another optimizer (SGD, AdamW, Muon, ...), and train with LBFGS after that"
                )
            found[id(optimizer)] = optimizer
    return tuple(found.values())


def check_held(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], argument: str) -> None:
    """Raise ValueError for optimizers none of whose parameters are the model's; others', such as a loss's, may be."""
    own = {id(parameter) for parameter in model.parameters()}
    if optimizers and not any(id(parameter) in own for parameter in parameters_of(optimizers)):
        kinds = ", ".join(sorted({type(optimizer).__name__ for optimizer in optimizers}))
        raise ValueError(
            f"{argument}: {kinds} holds no parameter of the model, expected one that was built from model.parameters()"
        )


def parameters_of(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[Tensor]:
    """The parameters in the groups of all optimizers."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            yield from group["params"]


def unheld_parameters(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> list[str]:
    """Names of the trainable parameters of the model that no optimizer holds."""
    held = {id(parameter) for parameter in parameters_of(optimizers)}
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]


def some_of(names: Sequence[str]) -> str:
    """The first few names, and how many there are beside."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, names[:_NAMED])) + more


class StepWatch:
    """Optimizers that nobody gave and that step all the same: whose step ends from now on, wherever it is called.

    A state that is not cut would meet a gradient of another shape at the next step, and a fused optimizer would not
    even notice. The watch ends with this object.
    """

    def __init__(self) -> None:
        self._seen: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        handle = register_optimizer_step_post_hook(_noting(self._seen))
        weakref.finalize(self, handle.remove)

    def holders_of(self, model: nn.Module, known: Sequence[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
        """Those seen that hold parameters of the model and are not among the known ones."""
        given = {id(optimizer) for optimizer in known}
        others = [optimizer for optimizer in self._seen if id(optimizer) not in given]
        if not others:  # as at nearly every step
            return []
        own = {id(parameter) for parameter in model.parameters()}
        return [o for o in others if any(id(parameter) in own for parameter in parameters_of([o]))]


def _noting(seen: weakref.WeakSet[torch.optim.Optimizer]) -> Callable[..., None]:
    def note(optimizer: torch.optim.Optimizer, _args: object, _kwargs: object) -> None:
        seen.add(optimizer)

    return note


def _is_optimizer(item: Any) -> bool:
    return isinstance(getattr(item, "param_groups", None), list) and isinstance(getattr(item, "state", None), Mapping)


def _with_wrapped(optimizer: Any) -> Iterator[Any]:
    """An optimizer, and all that its attributes hold."""
    yield optimizer
    for value in vars(optimizer).values():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if _is_optimizer(item):
                yield from _with_wrapped(item)


def _wanted(item: Any) -> str:
    if _is_optimizer(getattr(item, "optimizer", None)):  # a scheduler, a scaler's wrapper
        return "an optimizer: give its .optimizer"
    if isinstance(item, nn.Module):
        return "an optimizer; averaged copies of the model are ema_models="
    return "an optimizer with param_groups and state, or a list of them"
