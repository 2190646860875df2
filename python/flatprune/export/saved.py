"""A pruned network as plain values and tensors, which is what files hold, and a network from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flatprune import models, named
from flatprune.coupling.attention import make_prunable
from flatprune.cutting.surgery import sync_attributes
from flatprune.data import Normalization
from flatprune.errors import InputError
from flatprune.files.atomic import damaged


class SavedNetwork(NamedTuple):
    """What a network is rebuilt from.

    Attributes:
        arguments: name, image_shape, classes and widths that `flatprune.models.build` made it with.
        normalization: what its images go through first.
        tensors: its state dict, in the pruned shapes.
        attributes: numbers that modules of a class of the user's own hold, see `flatprune.save`.
        widths: layer name -> output channels or features.
        path: of the file that holds all this.
    """

    arguments: Mapping[str, Any]
    normalization: Normalization
    tensors: Mapping[str, Tensor]
    widths: Mapping[str, int]
    path: Path
    attributes: Mapping[str, Mapping[str, Any]] = {}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the network's input."""
        channels, height, width = self.arguments["image_shape"]
        return channels, height, width

    @property
    def is_own(self) -> bool:
        """Whether a function of the user's makes it."""
        return named.is_named(str(self.arguments.get("name")))

    def drawn(self) -> nn.Module:
        """The network as it was before training, with random numbers of torch's global stream."""
        arguments = self.arguments
        shape, widths = tuple(arguments["image_shape"]), arguments["widths"]
        return models.build(arguments["name"], shape, arguments["classes"], widths)

    def network(self) -> nn.Module:
        """The network in evaluation mode; its tensors are copies.

        Raises:
            InputError: a function of the user's makes it, which the user has not named, or it fails.
            DamagedError: the tensors are not those of such a network, or do not fit each other.
        """
        own = self._fresh() if self.is_own else None
        try:
            model = self.fill(own or self._fresh()).eval()
            self._check(model)
        except (*_MISFITS, RuntimeError, MemoryError) as error:  # shapes that do not fit each other, or no memory
            raise damaged(self.path, error) from error
        return model

    def _fresh(self) -> nn.Module:
        """The same; its values are thrown away, so they cost no random numbers."""
        rng = torch.get_rng_state()
        try:
            return self.drawn()
        finally:
            torch.set_rng_state(rng)

    def fill(self, model: nn.Module) -> nn.Module:
        """Make a fresh network of this class the saved one; returns it.

        Raises:
            InputError: names or dtypes of tensors differ.
        """
        for name, own in model.state_dict().items():
            if name in self.tensors and self.tensors[name].dtype != own.dtype:
                raise InputError(
                    f"tensor {name!r} is {self.tensors[name].dtype} in the file, {own.dtype} in the network"
                )
        take_tensors(model, self.tensors, self.attributes)
        return model

    @torch.no_grad()
    def _check(self, model: nn.Module) -> None:
        """Raise ValueError where the network is not the one described, or does not compute."""
        if models.layer_widths(model) != dict(self.widths):
            raise ValueError("its tensors do not have the widths that it tells of")
        channels = self.image_shape[0]
        for name in ("mean", "std"):
            value = getattr(self.normalization, name)
            if value.shape != (channels,) or not bool(value.isfinite().all()):
                raise ValueError(f"the normalization's {name} is not {channels} finite numbers")
        device = next(model.parameters()).device
        found = tuple(model(torch.zeros(1, *self.image_shape, device=device)).shape)
        if found[:2] != (1, self.arguments["classes"]):
            raise ValueError(f"the network's output is of shape {found}, not (1, {self.arguments['classes']})")


_MISFITS = (KeyError, TypeError, ValueError, IndexError, AttributeError)


def saved_network(
    path: Path,
    content: Mapping[str, Any],
    normalization: Callable[[Mapping[str, Any]], Normalization],
    tensors: Callable[[], Mapping[str, Tensor]],
) -> SavedNetwork:
    """A network from the content of a file: `model`, `widths`, `normalization` and what gives the tensors.

    Raises:
        DamagedError: something is missing, or is of another kind.
    """
    try:
        made = normalization(content["normalization"])
        attributes = dict(content.get("attributes", {}))
        return SavedNetwork(dict(content["model"]), made, dict(tensors()), dict(content["widths"]), path, attributes)
    except _MISFITS as error:
        raise damaged(path, error) from error


def take_tensors(
    model: nn.Module, tensors: Mapping[str, Tensor], attributes: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Replace every parameter and buffer of `model` by a copy of the tensor of that name, whatever its shape.

    Args:
        model: built as the network was before pruning; changed in place.
        tensors: state dict of the pruned network.
        attributes: numbers that code of the model holds and that pruning changed, and tensors that its state dict
            leaves out, module -> attribute -> value: `Pruner.state_dict()["attributes"]`. Numbers of torch's own layers
            follow from the tensors.

    Raises:
        InputError: names of tensors differ; nothing is changed then.
    """
    own = model.state_dict(keep_vars=True)
    for name in [*own, *tensors]:
        if (name in own) != (name in tensors):
            where = "the network" if name in own else "the file"
            raise InputError(f"tensor {name!r} is only in {where}; is it a network of another kind?")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.data = tensors[name].detach().clone().to(tensor.device)
    make_prunable(model)
    sync_attributes(model)
    for name, values in (attributes or {}).items():
        for key, value in values.items():
            module = model.get_submodule(name)
            own_value = getattr(module, key, None)
            if isinstance(value, Tensor) and isinstance(own_value, Tensor):
                value = value.detach().clone().to(own_value.device)
            setattr(module, key, value)
