"""Copies of a model that lose the same neurons as the model: averaged weights (EMA, SWA), or any deep copy.

A copy has the modules and tensors of the model under the same names, in the same shapes, but tensors of its own:
`copy.deepcopy(model)`, or a module that holds such a copy as its `module` (`AveragedModel` of torch, `ModelEmaV3` of
timm). Device and dtype may be others. It is cut with the model's own choice of neurons; where survivors are
compensated, its weights move by as much as the model's. Nothing else is done to it: what updates it goes on doing so,
unless that keeps views of the tensors from one update to the next; have it make them anew after a cut.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from flatprune.coupling.constants import register_tensors


def unwrapped(model: nn.Module, ema_model: nn.Module) -> nn.Module:
    """The copy: what was given, or its `module` if none of its own tensors is called as one of the model's."""
    inner = getattr(ema_model, "module", None)
    if isinstance(inner, nn.Module) and named_tensors(ema_model).keys().isdisjoint(named_tensors(model)):
        return inner
    return ema_model


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Qualified name -> every parameter and buffer."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def checked_ema_models(model: nn.Module, ema_models: Sequence[nn.Module]) -> tuple[nn.Module, ...]:
    """The copies, once each is known to be a copy of the model; raises TypeError or ValueError otherwise."""
    if isinstance(ema_models, nn.Module):  # a Sequential would be taken apart into layers
        raise TypeError(f"Pruner: ema_models is {type(ema_models).__name__}, expected a list of modules")
    for number, ema_model in enumerate(ema_models):
        check_ema_model(model, ema_model, f"Pruner: ema_models[{number}]")
    return tuple(ema_models)


def check_ema_model(model: nn.Module, ema_model: nn.Module, name: str) -> None:
    """Raise TypeError or ValueError, naming the first tensor that differs, if `ema_model` is no copy of the model."""
    if not isinstance(ema_model, nn.Module):
        held = [key for key, value in getattr(ema_model, "__dict__", {}).items() if isinstance(value, nn.Module)]
        give = f": give its .{held[0]}" if held else ""
        raise TypeError(f"{name} is {type(ema_model).__name__}, expected a torch.nn.Module{give}")
    copy = unwrapped(model, ema_model)
    register_tensors(copy, set(named_tensors(model)))
    own, found = named_tensors(model), named_tensors(copy)
    for key in [*own, *found]:
        if key not in own or key not in found:
            raise ValueError(f"{name}: {key!r} is only in {'the model' if key in own else 'it'}, expected a copy")
        if own[key].shape != found[key].shape:
            shapes = f"{tuple(found[key].shape)}, {tuple(own[key].shape)} in the model"
            raise ValueError(f"{name}: {key!r} has shape {shapes}; expected a copy that was cut along")
        if own[key] is found[key]:
            raise ValueError(f"{name}: {key!r} is the model's own tensor, expected a copy")
