"""Forwards of their own that say something of a watched model and count for nothing in its factors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from kfac_ext.curvature.calls import call_hooks
from kfac_ext.curvature.capture import Capture
from kfac_ext.curvature.curvature import Curvature
from kfac_ext.curvature.fisher import input_covariance
from kfac_ext.curvature.modes import RngState, batch_statistics, device_of, module_modes, undisturbed
from kfac_ext.curvature.recent import Call
from kfac_ext.layers import Layer


def observe(curvature: Curvature, *args: Any, **kwargs: Any) -> Capture:
    """A forward on these inputs with gradients, in the modes that the model is in, without autocast."""
    curvature.trace(*args, **kwargs)
    device = device_of(curvature.model)
    capture = Capture(RngState.now(device))
    with ExitStack() as stack:
        stack.enter_context(curvature.paused())
        stack.enter_context(undisturbed(curvature.model))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(call_hooks(curvature.layers.values(), capture.add))
        output = curvature.model(*args, **kwargs)
    call = Call.of(args, kwargs, curvature.reading.batch_dim)
    capture.read(curvature.reading, output, curvature.layers, call)
    curvature.place(capture, call)
    return capture


def reached_layers(curvature: Curvature, *args: Any, **kwargs: Any) -> frozenset[str]:
    """The layers whose z a gradient of the output reaches, as parameters are frozen now; others get no factors.

    In evaluation mode, or, where the model returns something else then, in training mode without dropout.

    Args:
        curvature: of the model.
        args, kwargs: inputs of the model for one forward.

    Raises:
        TypeError, ValueError: the output can be read in neither mode; says what is wrong in both.
    """
    curvature.trace(*args, **kwargs)
    if not curvature.loss.needs_output:  # any of its outputs may be in the loss
        return frozenset(curvature.layers)
    try:
        with module_modes(dict.fromkeys(curvature.model.modules(), False)):
            capture = observe(curvature, *args, **kwargs)
    except (TypeError, ValueError) as error:
        with module_modes(_still_modes(curvature.model)):
            try:
                capture = observe(curvature, *args, **kwargs)
            except (TypeError, ValueError) as other:
                raise type(other)(f"{other}; that is in training mode, in evaluation mode: {error}") from error
    if not capture.prediction.requires_grad:
        return frozenset()
    gradients = capture.gradients_of(capture.prediction, torch.ones_like(capture.prediction))
    return frozenset(name for name, calls in gradients.items() if any(g is not None for g in calls))


def fresh_look(
    curvature: Curvature,
    names: Iterable[str],
    calls: Sequence[Call],
    mode: str = "expand",
    *,
    bias: bool | None = True,
    samples: int | None = None,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """A of the layers named, apart from the running factors (the mean over all rows), and what the model predicts.

    One forward a call gives both, the newest call first. Ranks that share a batch each make their own part of a call;
    A is the mean of theirs, the predictions are their own.

    Batch norms use batch statistics (those frozen in a training model stay frozen), dropout is off, random streams and
    running statistics are untouched.

    Args:
        curvature: of the model.
        names: layers.
        calls: as `Curvature.recent_calls` gives them; each is made as it was.
        mode: "expand" or "reduce".
        bias: append the 1, so that the last row and column hold the mean patch; None: as in the running factors.
        samples: of all ranks, enough for an A that is of as many rows as it has: older calls count for the others
            alone, and are not made again where there are none. None: all calls count.

    Returns:
        Name -> A; and the predictions for the newest calls, those made again, oldest first.

    Raises:
        KeyError: naming what is no layer.
        RuntimeError: naming a layer that no forward calls.
        ValueError: there are no calls.
    """
    layers = [curvature.layer(name) for name in dict.fromkeys(names)]
    found: dict[str, Tensor] = {}
    seen: Counter[str] = Counter()  # rows
    complete: set[str] = set()  # layers that need no older calls

    def report(layer: Layer, x: Tensor, _z: Tensor) -> None:
        if layer.name in complete:
            return
        append = layer.constant if bias is None else bias
        rows = len(x) * (layer.position_count(x) if mode == "expand" else 1)
        share = rows / (seen[layer.name] + rows)
        found[layer.name] = input_covariance(layer, x, mode, bias=append, past=found.get(layer.name), share=share)
        seen[layer.name] += rows

    def forget() -> None:
        found.clear()
        seen.clear()

    def is_enough(so_far: int) -> bool:
        if samples is None or so_far * curvature.ranks < samples:
            return False
        complete.update(name for name, A in found.items() if seen[name] * curvature.ranks >= A.shape[-1])
        return len(complete) == len(layers)

    _refuse_none(calls)
    with call_hooks(layers, report):
        predictions = _predictions(curvature, calls, forget, is_enough)
    missing = [layer for layer in layers if layer.name not in found]
    if missing:  # in evaluation mode
        with torch.no_grad(), replaying(curvature, training=True), call_hooks(missing, report):
            for call in calls:
                call.run(curvature.model)
    for layer in layers:
        if layer.name not in found:
            raise RuntimeError(f"fresh_look: the forward did not call layer {layer.name!r}")
    covariances = {layer.name: found.pop(layer.name) for layer in layers}
    if curvature.group is not None:
        means = curvature.group.mean_of_symmetric(list(covariances.values()), "fresh covariances")
        covariances = dict(zip(covariances, means))
    return covariances, predictions


def fresh_predictions(curvature: Curvature, calls: Sequence[Call]) -> list[Tensor]:
    """The model's prediction for each call, as the loss reads it, in the modes of `fresh_look`.

    Models that return something else in evaluation mode are in training mode, without dropout.

    Args:
        curvature: of the model.
        calls: as `Curvature.recent_calls` gives them; each is made as it was.

    Raises:
        ValueError: there are no calls.
    """
    _refuse_none(calls)
    return _predictions(curvature, calls, lambda: None, lambda _samples: False)


@torch.no_grad()
def _predictions(
    curvature: Curvature,
    calls: Sequence[Call],
    forget: Callable[[], None],
    is_enough: Callable[[int], bool],
) -> list[Tensor]:
    """Of calls made again, the newest first, until those of so many samples are enough; in the calls' order.

    None where the loss knows nothing of the output. The first call ever made again shows whether evaluation mode can be
    read; if not, it is made once more, in training mode, and `forget` is called in between.
    """
    reads = curvature.loss.needs_output
    found: list[Any] = []
    if reads and curvature.reading.only_in_training is None:
        first = _read_in_evaluation(curvature, calls[-1])
        if first is None:
            forget()
        else:
            found.append(first)
    with replaying(curvature):
        while len(found) < len(calls) and not is_enough(sum(c.samples for c in calls[len(calls) - len(found) :])):
            output = calls[-1 - len(found)].run(curvature.model)
            found.append(curvature.reading.read(output) if reads else None)
    return found[::-1] if reads else []


@contextmanager
def replaying(curvature: Curvature, *, training: bool = False) -> Iterator[None]:
    """Forwards inside disturb nothing: evaluation mode, batch norms on batch statistics, factors stay.

    Args:
        curvature: of the model.
        training: training mode but for dropout, as for models that return something else in evaluation mode.
    """
    model = curvature.model
    training = training or _reads_only_training(curvature)
    modes = module_modes(_still_modes(model)) if training else batch_statistics(model)
    with curvature.paused(), modes, undisturbed(model):
        yield


def _reads_only_training(curvature: Curvature) -> bool:
    """Whether the loss cannot read what the model returns in evaluation mode; tried once, if no call has shown it."""
    reading = curvature.reading
    if reading.only_in_training is None and curvature.loss.needs_output and curvature.recent_calls:
        with torch.no_grad():
            _read_in_evaluation(curvature, curvature.recent_calls[-1])
    return bool(reading.only_in_training)


def _read_in_evaluation(curvature: Curvature, call: Call) -> Tensor | None:
    """What the model predicts in evaluation mode, None if the loss cannot read it; notes which."""
    model, reading = curvature.model, curvature.reading
    with curvature.paused(), batch_statistics(model), undisturbed(model):
        output = call.run(model)
    try:
        prediction = reading.read(output)
    except (TypeError, ValueError):
        reading.only_in_training = True
        return None
    reading.only_in_training = False
    return prediction


def _still_modes(model: nn.Module) -> dict[nn.Module, bool]:
    """Training mode without dropout; what is frozen in a training model stays so."""
    return {
        module: (module.training or not model.training) and not isinstance(module, _DropoutNd)
        for module in model.modules()
    }


def _refuse_none(calls: Sequence[Call]) -> None:
    if not calls:
        raise ValueError("Curvature: no calls to make again, the model has made no training forward yet")
