"""Numbers that modules hold beside their tensors: what layers of torch say of their sizes, and integers found by trial.

A layer kind of your own whose forward reads such a number enters itself into `ATTRIBUTES`:

    @attributes_of(MyNorm)
    def my_norm(module, shapes):
        return {"channels": shapes["weight"][0]}

Kinds that are not here are found out: an integer that equals a width which changes, and without whose change the
network does not run or computes something else, is followed from then on (see `flatprune.coupling.trial`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from flatprune.coupling.attention import PrunableAttention
from flatprune.coupling.neurons import Attribute, Coupling

Shapes = Mapping[str, Sequence[int]]  # key of a module's own tensor -> its shape
Describe = Callable[[Any, Shapes], dict[str, Any]]
ATTRIBUTES: dict[type, Describe] = {}  # the most derived class of a module counts


def attributes_of(*kinds: type) -> Callable[[Describe], Describe]:
    """Enter a function that gives a module's attributes from the shapes of its own tensors."""

    def enter(describe: Describe) -> Describe:
        ATTRIBUTES.update(dict.fromkeys(kinds, describe))
        return describe

    return enter


def known_attributes(module: nn.Module, shapes: Shapes) -> dict[str, Any]:
    """Attributes of a module whose tensors have these shapes; empty where its kind is not known.

    Example:
        >>> known_attributes(nn.Linear(8, 4), {"weight": (3, 8), "bias": (3,)})
        {'out_features': 3, 'in_features': 8}
    """
    for kind in type(module).__mro__:
        if kind in ATTRIBUTES:
            found = ATTRIBUTES[kind](module, shapes)
            return {key: value for key, value in found.items() if hasattr(module, key)}
    return {}


def own_shapes(module: nn.Module) -> dict[str, Sequence[int]]:
    """The shapes of a module's own parameters and buffers."""
    return {key: t.shape for key, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}


@attributes_of(nn.Linear)
def linear(module: nn.Linear, shapes: Shapes) -> dict[str, Any]:
    """Weight [out, in]."""
    return {"out_features": shapes["weight"][0], "in_features": shapes["weight"][1]} if "weight" in shapes else {}


@attributes_of(nn.Bilinear)
def bilinear(module: nn.Bilinear, shapes: Shapes) -> dict[str, Any]:
    """Weight [out, in1, in2]."""
    return dict(zip(("out_features", "in1_features", "in2_features"), shapes["weight"]))


@attributes_of(_ConvNd)
def convolution(module: _ConvNd, shapes: Shapes) -> dict[str, Any]:
    """Weight [out, in/groups, kernel], transposed [in, out/groups, kernel]; depthwise ones lose groups."""
    if "weight" not in shapes:
        return {}
    first, second = shapes["weight"][:2]
    groups = module.groups
    if isinstance(module, _ConvTransposeNd):
        if 1 < groups == module.in_channels:
            groups = first
        return {"in_channels": first, "out_channels": second * groups, "groups": groups}
    if 1 < groups == module.in_channels:
        groups = first // (module.out_channels // module.in_channels)
    return {"out_channels": first, "in_channels": second * groups, "groups": groups}


@attributes_of(_NormBase)
def batch_norm(module: _NormBase, shapes: Shapes) -> dict[str, Any]:
    """Vectors [channels]."""
    found = shapes.get("weight", shapes.get("running_mean"))
    return {} if found is None else {"num_features": found[0]}


@attributes_of(nn.LayerNorm, nn.RMSNorm)
def layer_norm(module: nn.Module, shapes: Shapes) -> dict[str, Any]:
    """Weight of the normalised shape."""
    return {"normalized_shape": tuple(shapes["weight"])} if "weight" in shapes else {}


@attributes_of(nn.GroupNorm)
def group_norm(module: nn.GroupNorm, shapes: Shapes) -> dict[str, Any]:
    """Vectors [channels]; where each channel was a group, it stays so."""
    if "weight" not in shapes:
        return {}
    size = shapes["weight"][0]
    whole = module.num_groups == module.num_channels or size < module.num_groups
    return {"num_groups": size if whole else module.num_groups, "num_channels": size}


@attributes_of(nn.PReLU)
def prelu(module: nn.PReLU, shapes: Shapes) -> dict[str, Any]:
    """Weight [channels] or [1]."""
    return {"num_parameters": shapes["weight"][0]}


@attributes_of(nn.Embedding, nn.EmbeddingBag)
def embedding(module: nn.Module, shapes: Shapes) -> dict[str, Any]:
    """Weight [rows, channels]."""
    return {"num_embeddings": shapes["weight"][0], "embedding_dim": shapes["weight"][1]}


@attributes_of(nn.RNNBase)
def recurrent(module: nn.RNNBase, shapes: Shapes) -> dict[str, Any]:
    """weight_ih_l0 [gates hidden, input], weight_hh_l0 [gates hidden, hidden or projected]."""
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    rows, inputs = shapes["weight_ih_l0"]
    found = {"input_size": inputs, "hidden_size": rows // gates}
    if module.proj_size:
        found["proj_size"] = shapes["weight_hh_l0"][1]
    return found


@attributes_of(nn.RNNCellBase)
def recurrent_cell(module: nn.RNNCellBase, shapes: Shapes) -> dict[str, Any]:
    """weight_ih [gates hidden, input], weight_hh [gates hidden, hidden]."""
    return {"input_size": shapes["weight_ih"][1], "hidden_size": shapes["weight_hh"][1]}


@attributes_of(PrunableAttention)
def attention(module: PrunableAttention, shapes: Shapes) -> dict[str, Any]:
    """As many heads as the rows of the projections make."""
    return module.sizes(shapes)


# integers that no layer of a known kind has


def integers(module: nn.Module, least: int = 2) -> Iterator[tuple[str, int | str | None, int]]:
    """(name, place in it or None, value) of every integer from `least` on among a module's attributes and in these."""
    for key, value in vars(module).items():
        if key.startswith("__") or key in ("_version",):
            continue
        if type(value) is int and value >= least:
            yield key, None, value
        elif isinstance(value, (tuple, list, dict)):
            for place, item in value.items() if isinstance(value, dict) else enumerate(value):
                if type(item) is int and item >= least and isinstance(place, (int, str)):
                    yield key, place, item


def with_integer(held: Any, place: int | str | None, value: int) -> Any:
    """An attribute with another integer in it."""
    if place is None:
        return value
    if isinstance(held, dict):
        return {**held, place: value}
    items = list(held)
    items[place] = value  # type: ignore[index]
    return items if isinstance(held, list) else tuple(items)


def held_attributes(model: nn.Module, coupling: Coupling) -> dict[str, dict[str, Any]]:
    """Module -> attribute -> value: integers that follow a width, tensors that a state dict leaves out.

    It is what a fresh model needs beside its state dict.
    """
    modules = dict(model.named_modules())
    held: dict[str, dict[str, Any]] = {}
    for attribute in (a for found in coupling.attributes.values() for a in found):
        held.setdefault(attribute.module, {})[attribute.key] = getattr(modules[attribute.module], attribute.key)
    for name in (name for group in coupling.groups for member in group.members for name in member.names):
        module, _, key = name.rpartition(".")
        if key in modules[module]._non_persistent_buffers_set:
            held.setdefault(module, {})[key] = getattr(modules[module], key)
    return held


def followed(
    modules: Mapping[str, nn.Module], attributes: Mapping[str, Sequence[Attribute]], removed: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """Module -> attribute -> value after the groups named have lost this many neurons."""
    changed: dict[str, dict[str, Any]] = {}
    for group, count in removed.items():
        for attribute in attributes.get(group, ()):
            own = changed.setdefault(attribute.module, {})
            held = own.get(attribute.key, getattr(modules[attribute.module], attribute.key))
            now = held if attribute.place is None else held[attribute.place]
            own[attribute.key] = with_integer(held, attribute.place, attribute.after(now, count))
    return changed
