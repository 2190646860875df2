"""Example inputs as people have them, a tensor, arguments, keywords or a batch of a loader, read as calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, Dataset

from flatprune.coupling.calls import first_lines, traced_mode, unchanged
from kfac_ext.curvature.recent import Call

GIVE = "give what its forward takes, as (args, kwargs), or a batch and forward=lambda model, batch: model(...)"
_NAMED = 4  # entries of a container that a message shows


def example_calls(model: nn.Module, example_inputs: Any, forward: Callable[..., Any] | None = None) -> list[Call]:
    """Calls of `model` that example inputs stand for.

    | given | call |
    | --- | --- |
    | a tensor | model(x) |
    | a tuple or list | model(*x), or model(x) if that is what works |
    | a tuple of a tuple and a dict | model(*args, **kwargs), or model(args, kwargs) if only that works |
    | a dict | model(**x), or model(x) if only that works |
    | a `Call`, or several that together reach everything | as they say |
    | anything, with `forward` | the calls that `forward(model, x)` makes |

    Where two readings are possible one call in evaluation mode decides, which leaves the model as it was.

    Args:
        model: any module that runs eagerly.
        example_inputs: one or two samples do.
        forward: a function of the model and the example inputs (or of these alone) that calls the model, as a training
            loop does with a batch; of calls of the same shapes one counts.

    Raises:
        TypeError: `example_inputs` is a loader, a dataset, an iterator or None; `forward` is no function.
        ValueError: it is empty or has no samples; the model can be called in no way; `forward` raises, or does not call
            the model.

    Example:
        >>> example_calls(model, next(iter(loader)), lambda model, batch: model(batch["image"], batch["mask"]))
        [Call(args=(tensor(...), tensor(...)), kwargs={})]
    """
    calls = _calls(model, example_inputs, forward)
    for call in calls:
        first = next((tensor for tensor in call.tensors() if tensor.dim()), None)
        if first is not None and not len(first):
            raise ValueError(f"example_inputs: {described(call)} has no samples, expected one or more")
    return calls


def _calls(model: nn.Module, example_inputs: Any, forward: Callable[..., Any] | None) -> list[Call]:
    _check_kind(example_inputs)
    if forward is not None:
        return _recorded(model, example_inputs, forward)
    if isinstance(example_inputs, Call):
        return [example_inputs]
    if isinstance(example_inputs, (list, tuple)) and all(isinstance(item, Call) for item in example_inputs):
        if not example_inputs:
            raise ValueError("example_inputs is empty, expected what the model can be called with")
        return list(example_inputs)
    readings = list(_readings(example_inputs))
    problems = {name: _cannot_take(model, call) for name, call in readings}
    fitting = [(name, call) for name, call in readings if not problems[name]]
    if fitting == readings[:1]:  # the trace that follows says in which module it raises
        return [fitting[0][1]]
    for name, call in fitting:
        problems[name] = _raised(model, call)
        if not problems[name]:
            return [call]
    told = "; ".join(f"as {name}: {problem}" for name, problem in problems.items())
    raise ValueError(f"example_inputs: the model cannot be called with {described(example_inputs)}, {told}; {GIVE}")


def described(value: Any) -> str:
    """Shapes and types of nested inputs, such as "(float32 [2, 20], {'mask': bool [2, 5]})"."""
    if isinstance(value, Call):
        return described((*value.args, dict(value.kwargs)) if value.kwargs else value.args)
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, Mapping):
        shown = [f"{key!r}: {described(item)}" for key, item in list(value.items())[:_NAMED]]
        return "{" + ", ".join(shown) + (", ...}" if len(value) > _NAMED else "}")
    if isinstance(value, (tuple, list)):
        shown = [described(item) for item in value[:_NAMED]] + (["..."] if len(value) > _NAMED else [])
        return f"({', '.join(shown)})" if isinstance(value, tuple) else f"[{', '.join(shown)}]"
    return repr(value) if isinstance(value, (bool, int, float, str, type(None))) else type(value).__name__


def _check_kind(given: Any) -> None:
    if given is None:
        raise TypeError("example_inputs is None, expected what the model can be called with")
    if isinstance(given, (DataLoader, Dataset)) or (isinstance(given, Iterator) and not isinstance(given, Tensor)):
        raise TypeError(
            f"example_inputs is {type(given).__name__}, expected a batch out of it, next(iter(loader)), with "
            "forward=lambda model, batch: model(...) if the model does not take it as it is"
        )


def _readings(given: Any) -> Iterator[tuple[str, Call]]:
    """(name, call) of all that example inputs can mean, the likeliest first."""
    if isinstance(given, Mapping):
        if _names(given):
            yield "keywords", Call((), dict(given))
        yield "one argument", Call((given,))
    elif isinstance(given, (tuple, list)):
        if _is_args_and_kwargs(given):
            yield "(args, kwargs)", Call(tuple(given[0]), dict(given[1]))
        yield "positional arguments", Call(tuple(given))
        yield "one argument", Call((given,))
    else:
        yield "one argument", Call((given,))


def _is_args_and_kwargs(given: Any) -> bool:
    if len(given) != 2 or not isinstance(given[0], (tuple, list)) or not isinstance(given[1], Mapping):
        return False
    return not given[1] or _names(given[1])


def _names(mapping: Mapping[Any, Any]) -> bool:
    return bool(mapping) and all(isinstance(key, str) for key in mapping)


def _cannot_take(model: nn.Module, call: Call) -> str:
    """Why the forward has no such arguments, in a line; empty if it has."""
    try:
        inspect.signature(model.forward).bind(*call.args, **call.kwargs)
    except TypeError as error:
        return first_lines(error)
    except ValueError:  # it has no signature
        return ""
    return ""


def _raised(model: nn.Module, call: Call) -> str:
    """What a call in evaluation mode raises, in a line; empty if nothing."""
    try:
        with unchanged(model), traced_mode(model, training=False):
            call.run(model)
    except Exception as error:
        return first_lines(error)
    return ""


def _recorded(model: nn.Module, batch: Any, forward: Callable[..., Any]) -> list[Call]:
    """The calls of the model that `forward` makes, of those of the same shapes the first."""
    takes_model = _takes_model(forward, model, batch)
    found: dict[Any, Call] = {}

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = Call(args, kwargs)
        found.setdefault(_shapes(call), call)

    handle = model.register_forward_pre_hook(note, prepend=True, with_kwargs=True)
    try:
        with unchanged(model), traced_mode(model, training=False):
            forward(model, batch) if takes_model else forward(batch)
    except Exception as error:
        raise ValueError(
            f"forward: it raises with example_inputs {described(batch)} ({first_lines(error)}); expected a function "
            "that only calls the model, without a backward, as lambda model, batch: model(batch[0])"
        ) from error
    finally:
        handle.remove()
    if not found:
        raise ValueError("forward: it does not call the model, expected model(...) in it, not a method of the model")
    return list(found.values())


def _takes_model(forward: Any, model: nn.Module, batch: Any) -> bool:
    if not callable(forward):
        raise TypeError(f"forward is {type(forward).__name__}, expected one such as lambda model, batch: model(...)")
    try:
        signature = inspect.signature(forward)
    except (TypeError, ValueError):  # of something built in
        return True
    for arguments in ((model, batch), (batch,)):
        try:
            signature.bind(*arguments)
        except TypeError:
            continue
        return len(arguments) == 2
    raise TypeError(f"forward takes {signature}, expected (model, batch) or (batch)")


def _shapes(call: Call) -> Any:
    leaves, spec = tree_flatten((call.args, dict(call.kwargs)))
    shapes = [(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else repr(x) for x in leaves]
    return str(spec), tuple(shapes)
