"""How a network of transformers is built from a small configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bench.zoo.network import Builder, Inputs, Network, by_name, normal


def logits(output: Any) -> Tensor:
    """What classifiers of transformers return."""
    return output.logits


def hugging(
    kind: str,
    inputs: Callable[[int], Inputs],
    output: Callable[[Any], Tensor] = logits,
    loss: str = "cross_entropy",
    **settings: Any,
) -> Builder:
    """Builder of the class `kind` of transformers.

    Args:
        kind: for example "BertForSequenceClassification".
        inputs, output, loss: see `Network`.
        settings: of its configuration.
    """

    def build() -> Network:
        import transformers  # here, so that names can be listed without it

        transformers.logging.set_verbosity_error()
        model_class = getattr(transformers, kind)
        model = model_class(model_class.config_class(**settings))
        return Network(model.train(), inputs, output, loss)

    return build


def pixels(size: int = 32, name: str = "pixel_values") -> Callable[[int], Inputs]:
    """Maker of images as keyword."""
    return by_name(**{name: lambda n: normal(3, size, size)(n)[0]})
