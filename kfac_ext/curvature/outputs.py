"""What of a model's output the loss is of, and where samples and classes stand in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kfac_ext.curvature.loss import Loss
from kfac_ext.curvature.losses import SeveralLosses
from kfac_ext.curvature.value_losses import GaussianNll

Pick: TypeAlias = "str | int | Callable[[Any], Any] | Sequence[str | int] | None"

_LOGITS = "logits"  # what the libraries of models call it
_DEPTH = 3  # of containers inside containers that are looked through


class Reading:
    """How the output of a model is read: from what it returns to the prediction of `kfac_ext.curvature.loss`.

    Args:
        loss: what is made of the prediction.
        output: a key, attribute or index of what the model returns, a function of it, or a list of keys for several
            losses. None: the only floating-point tensor, or what is called "logits".
        class_dim: dimension of the classes in the output; None: 1 of two; of more, that of the features of the layer
            whose output it is.
        batch_dim: dimension that counts samples in an output of three dimensions or more.

    Attributes:
        features: of each tensor that is picked, (dimension, size) of the features of the layer whose output it is; a
            dimension of None is not known. Set once the layers are found.
        only_in_training: whether evaluation mode returns what cannot be read; None: not known yet.
    """

    def __init__(self, loss: Loss, output: Pick = None, class_dim: int | None = None, batch_dim: int = 0) -> None:
        if class_dim is not None and (isinstance(class_dim, bool) or not isinstance(class_dim, int)):
            raise TypeError(f"Curvature: class_dim is {class_dim!r}, expected a whole number")
        if isinstance(batch_dim, bool) or not isinstance(batch_dim, int) or batch_dim < 0:
            raise ValueError(f"Curvature: batch_dim is {batch_dim!r}, expected a whole number >= 0")
        self.loss, self.class_dim, self.batch_dim = loss, class_dim, batch_dim
        self.output: Pick = None
        self.tell(output)
        self.features: Sequence[tuple[int | None, int]] = ()
        self.only_in_training: bool | None = None

    def tell(self, output: Pick) -> None:
        """Say what the loss is of, if that has not been said.

        Raises:
            TypeError: `output` is nothing that picks.
            ValueError: something else has been said.
        """
        if not (output is None or isinstance(output, (str, int, list, tuple)) or callable(output)):
            raise TypeError(f"Curvature: output is {output!r}, expected a key, an index, a function or a list of keys")
        if self.output is not None and self.output is not output and self.output != output:
            raise ValueError(f"Curvature: output is {_said(self.output)} already, and now {_said(output)}")
        self.output = output

    def picked(self, output: Any) -> tuple[Tensor, ...]:
        """The tensors of an output that the loss is of, as the model returned them.

        Raises:
            TypeError: what is picked is no tensor.
            ValueError: several tensors could be meant, or there is nothing of that key.
        """
        if self.output is None:
            return self._only(output)
        if isinstance(self.output, (list, tuple)):
            found = [_entry(output, key) for key in self.output]
        elif isinstance(self.output, (str, int)):
            found = [_entry(output, self.output)]
        else:
            made = self.output(output)  # type: ignore[operator]
            found = list(made) if isinstance(made, (tuple, list)) else [made]
        for one in found:
            if not isinstance(one, Tensor):
                raise TypeError(
                    f"Curvature: output={_said(self.output)} gives a {type(one).__name__}, expected tensors"
                )
        return tuple(found)

    def prediction(self, tensors: Sequence[Tensor]) -> Tensor:
        """What `picked` gave, as the loss reads it: samples first, classes second.

        Raises:
            ValueError: it is ambiguous where the classes stand, or the shape is none that the loss reads.
        """
        loss = self.loss
        if isinstance(loss, SeveralLosses):
            if len(tensors) != len(loss.losses):
                raise ValueError(
                    f"Curvature: {len(loss.losses)} losses, and output gives {len(tensors)} of what the model returns; "
                    "expected as many, such as output=['boxes', 'classes']"
                )
            parts = [
                self._prediction(one, tensor, place) for place, (one, tensor) in enumerate(zip(loss.losses, tensors))
            ]
            return loss.together(parts)
        if isinstance(loss, GaussianNll) and len(tensors) == 2:
            mean, variance = tensors
            tensors = (torch.stack([mean, variance.expand_as(mean)], dim=-1).movedim(-1, 1),)
        if len(tensors) != 1:
            raise ValueError(
                f"Curvature: output gives {len(tensors)} tensors, expected one, or as many losses: "
                f"loss=[{loss.name!r}, ...]"
            )
        return self._prediction(loss, tensors[0])

    def read(self, output: Any) -> Tensor:
        """`prediction` of what is `picked`."""
        return self.prediction(self.picked(output))

    def _prediction(self, loss: Loss, tensor: Tensor, place: int = 0) -> Tensor:
        batch_dim = self.batch_dim if tensor.dim() > 2 else 0
        if loss.has_classes and tensor.dim() > 1:
            class_dim = self._class_dim(tensor, batch_dim, place)
            if (batch_dim, class_dim) != (0, 1):
                tensor = tensor.movedim((batch_dim, class_dim), (0, 1))
        elif batch_dim:
            tensor = tensor.movedim(batch_dim, 0)
        loss.check(tensor)
        return tensor

    def _class_dim(self, tensor: Tensor, batch_dim: int, place: int) -> int:
        shape, dim = tuple(tensor.shape), tensor.dim()
        if self.class_dim is not None:
            if not -dim <= self.class_dim < dim or self.class_dim % dim == batch_dim:
                raise ValueError(f"Curvature: class_dim is {self.class_dim}, the output has the shape {shape}")
            return self.class_dim % dim
        if dim == 2:
            return 1
        known, size = self.features[place] if place < len(self.features) else (None, None)
        if known is not None:
            return known % dim
        fitting = [d for d in range(dim) if d != batch_dim and shape[d] == size]
        if len(fitting) == 1:
            return fitting[0]
        raise ValueError(
            f"Curvature: the output {shape} has {shape[1]} classes if they are dimension 1, as torch's cross_entropy "
            f"reads it, or {shape[-1]} if they are the last; class_dim=1 or class_dim=-1 says which"
        )

    def _only(self, output: Any) -> tuple[Tensor, ...]:
        if isinstance(output, Tensor):
            return (output,)
        if _LOGITS in (parts := dict(_parts(output))) and isinstance(parts[_LOGITS], Tensor):
            return (parts[_LOGITS],)
        found = dict(_tensors(output))
        if len(found) == 1 or (len(found) == 2 and isinstance(self.loss, GaussianNll)):
            return tuple(found.values())
        what = f"Curvature: the model returns {_a(output)}"
        if not found:
            raise TypeError(
                f"{what} without a floating-point tensor to read; output= picks one, or gives one by a function"
            )
        listed = " or ".join(f"{path} {tuple(t.shape)}" for path, t in found.items())
        raise ValueError(f"{what}, and the loss may be of {listed}; output= says of which: a key, an index, a function")


def tensors_of(output: Any) -> list[Tensor]:
    """The floating-point tensors that an output is or holds."""
    return [output] if isinstance(output, Tensor) else [tensor for _, tensor in _tensors(output)]


def _parts(output: Any) -> list[tuple[Any, Any]]:
    """What a container holds, by key, attribute or index."""
    if isinstance(output, Mapping):
        return list(output.items())
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return list(zip(output._fields, output))
    if isinstance(output, (tuple, list)):
        return list(enumerate(output))
    if dataclasses.is_dataclass(output):
        return [(field.name, getattr(output, field.name)) for field in dataclasses.fields(output)]
    return list(getattr(output, "__dict__", {}).items())


def _tensors(output: Any, path: str = "output", depth: int = _DEPTH) -> Iterator[tuple[str, Tensor]]:
    """Floating-point tensors in a container that are no single numbers, as a loss is, each with the path to it."""
    for key, value in _parts(output):
        inner = f"{path}[{key!r}]"
        if isinstance(value, Tensor):
            if value.is_floating_point() and value.dim():
                yield inner, value
        elif depth > 1 and isinstance(value, (Mapping, tuple, list)):
            yield from _tensors(value, inner, depth - 1)


def _entry(output: Any, key: str | int) -> Any:
    parts = dict(_parts(output))
    if key in parts:
        return parts[key]
    if isinstance(key, str) and hasattr(output, key) and not isinstance(output, Tensor):
        return getattr(output, key)
    values = list(parts.values())
    if isinstance(key, int) and values and -len(values) <= key < len(values):
        return values[key]
    raise ValueError(
        f"Curvature: output={key!r}, but the model returns {_a(output)} with {list(parts) or 'nothing in it'}"
    )


def _a(output: Any) -> str:
    return f"{type(output).__name__} {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__


def _said(output: Pick) -> str:
    return getattr(output, "__name__", "a function") if callable(output) else repr(output)
