"""What a network of the zoo is: a model with random weights, what it is called with, and what of its output counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[Any, ...] | dict[str, Any]  # positional arguments, or keywords


def itself(output: Any) -> Tensor:
    """The output as it is: one tensor."""
    return output


@dataclass
class Network:
    """A model and how it is used.

    Attributes:
        model: with random weights, in training mode.
        inputs: number of samples -> what the model is called with.
        output: the model's output -> the tensor that counts; classes are dimension 1.
        loss: "cross_entropy", or "mse" for outputs that are no classes.
    """

    model: nn.Module
    inputs: Callable[[int], Inputs]
    output: Callable[[Any], Tensor] = itself
    loss: str = "cross_entropy"

    def one_tensor(self) -> nn.Module:
        """The model as training with curvature wants it: it returns the tensor that counts and nothing else."""
        return self.model if self.output is itself else OneTensor(self.model, self.output)


class OneTensor(nn.Module):
    """A model of whose output one tensor counts; `names` are those of its positional arguments if it wants keywords."""

    def __init__(self, model: nn.Module, output: Callable[[Any], Tensor], names: Sequence[str] = ()) -> None:
        super().__init__()
        self.model, self._output, self._names = model, output, names

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call the model and take that tensor."""
        if self._names:
            args, kwargs = (), {**dict(zip(self._names, args)), **kwargs}
        return self._output(self.model(*args, **kwargs))


def by_position(network: Network) -> Network:
    """The same network with positional arguments, of which recent ones can be kept while it trains."""
    example = network.inputs(2)
    if not isinstance(example, dict):
        return network
    model = OneTensor(network.model, network.output, tuple(example))
    return Network(model, lambda n: tuple(dict(network.inputs(n)).values()), loss=network.loss)


Builder = Callable[[], Network]


def call(model: nn.Module, inputs: Inputs) -> Any:
    """The model's output for positional arguments or keywords."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def named(name: str) -> Callable[[Any], Tensor]:
    """Take an attribute or key of an output."""
    return lambda output: output[name]


def classes_last(name: str = "") -> Callable[[Any], Tensor]:
    """Move the classes of [n, positions, classes] to dimension 1, of an output or of what it has under a name."""
    return lambda output: (output[name] if name else output).transpose(1, -1)


def normal(*shape: int) -> Callable[[int], Inputs]:
    """Maker of one input [n, *shape] of normal numbers."""
    return lambda n: (torch.randn(n, *shape),)


def images(size: int, channels: int = 3) -> Callable[[int], Inputs]:
    """Maker of square images."""
    return normal(channels, size, size)


def whole_numbers(n: int, length: int, size: int = 200) -> Tensor:
    """Tokens [n, length] below `size`, none of the first few, which often have a meaning."""
    return torch.randint(5, size, (n, length))


def by_name(**makers: Callable[[int], Tensor]) -> Callable[[int], Inputs]:
    """Maker of inputs that are given as keywords."""
    return lambda n: {name: make(n) for name, make in makers.items()}


def tokens(length: int = 12, *names: str) -> Callable[[int], Inputs]:
    """Maker of keywords (default `input_ids`) that are tokens [n, length]."""
    return by_name(**dict.fromkeys(names or ("input_ids",), lambda n: whole_numbers(n, length)))
