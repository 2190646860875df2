"""Kept indices of every tensor when neurons go, and the dry run that proves a group can be cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from flatprune.neurons import CONSUMER, Member, NeuronGroup, Refused, channels, is_depthwise, shares_of, weight_of

_DRY_RUN_TOLERANCE = 1e-3  # of the largest output; sums in another order differ by 1e-6, a wrong channel by 1


class Cut(NamedTuple):
    """What stays of a tensor.

    Attributes:
        rows: int64 [m] kept indices of dimension 0, or None for all.
        columns: int64 [m] kept indices of dimension 1, or [groups, m] of each group of rows; None for all.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None

    def apply(self, tensor: Tensor) -> Tensor:
        """A new tensor with the kept entries, in the memory format of `tensor`."""
        kept = tensor
        if self.columns is not None and self.columns.dim() == 2:
            groups = self.columns.shape[0]
            kept = kept.unflatten(0, (groups, -1))  # [groups, rows, columns, ...]
            index = self.columns.to(tensor.device).view(groups, 1, -1, *[1] * (kept.dim() - 3))
            index = index.expand(-1, kept.shape[1], -1, *kept.shape[3:])
            kept = kept.gather(2, index).flatten(0, 1)
        elif self.columns is not None:
            kept = kept.index_select(1, self.columns.to(tensor.device))
        if self.rows is not None:
            kept = kept.index_select(0, self.rows.to(tensor.device))
        if tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
            return kept.contiguous(memory_format=torch.channels_last)
        return kept.contiguous()


class LayerCut(NamedTuple):
    """Kept channels of one layer: int64 [m] each, None for all.

    Attributes:
        name: qualified name of the layer.
        module: the layer.
        outputs: kept output channels (of a norm or depthwise convolution: channels).
        inputs: kept input channels.
    """

    name: str
    module: nn.Module
    outputs: Tensor | None
    inputs: Tensor | None

    @property
    def columns(self) -> Tensor | None:
        """Kept columns of the weight, in units of input channels: [m], or [groups, m] within each group."""
        shares = shares_of(self.module)
        if self.inputs is None or shares == 1:
            return self.inputs
        return (self.inputs % weight_of(self.module).shape[1]).view(shares, -1)

    def tensors(self) -> Iterator[tuple[str, Tensor, Cut]]:
        """(qualified name, tensor, cut) of every parameter and buffer of the layer that loses entries."""
        own = {**self.module._parameters, **self.module._buffers}
        for key, tensor in own.items():
            if tensor is None or tensor.dim() == 0:
                continue
            cut = Cut(self.outputs, self.columns if key == "weight" and tensor.dim() > 1 else None)
            if cut.rows is not None or cut.columns is not None:
                yield tensor_name(self.name, key), tensor, cut


def layer_cuts(groups: Sequence[NeuronGroup], gone: Mapping[int, Tensor]) -> dict[str, LayerCut]:
    """Name -> kept channels of every layer that loses some.

    Args:
        groups: the groups of the network.
        gone: position of a group -> indices [m] of its neurons that go.
    """
    lost: dict[tuple[str, bool], list[Tensor]] = {}
    modules: dict[str, nn.Module] = {}
    for position, neurons in gone.items():
        for member in groups[position].members:
            modules[member.name] = member.module
            lost.setdefault((member.name, member.role == CONSUMER), []).append(member.index[neurons].flatten())
    cuts = {}
    for name, module in modules.items():
        outputs, inputs = (
            _kept(channels(module, CONSUMER if side else ""), lost[name, side]) if (name, side) in lost else None
            for side in (False, True)
        )
        cuts[name] = LayerCut(name, module, outputs, inputs)
    return cuts


def weight_columns(module: nn.Module, inputs: Tensor) -> Tensor:
    """Columns of `weight.flatten(1)` that input channels [..., k] feed: [..., k kh kw], within their group."""
    weight = weight_of(module)
    area = weight[0, 0].numel()
    return ((inputs % weight.shape[1])[..., None] * area + torch.arange(area)).flatten(-2)


def tensor_name(layer: str, key: str) -> str:
    """Qualified name of the tensor `key` of a layer, as in `state_dict`."""
    return f"{layer}.{key}" if layer else key


def _kept(size: int, lost: Iterable[Tensor]) -> Tensor:
    mask = torch.ones(size, dtype=torch.bool)
    mask[torch.cat(list(lost))] = False
    return mask.nonzero().flatten()


def renumbered(member: Member, neurons: Tensor, cut: LayerCut) -> Tensor:
    """The index of a member after the cut, for the neurons [m] that stay."""
    kept = cut.inputs if member.role == CONSUMER else cut.outputs
    index = member.index[neurons]
    if kept is None:
        return index
    position = torch.full((channels(member.module, member.role),), -1, dtype=torch.int64)
    position[kept] = torch.arange(len(kept))
    return position[index]


def _without_columns(module: nn.Module, inputs: Tensor) -> Tensor:
    """A copy of a consumer's weight with zeros in the columns of the input channels `inputs` [m]."""
    masked = weight_of(module).detach().clone()
    inputs, size = inputs.to(masked.device), masked.shape[1]
    rows_of_share = masked.unflatten(0, (shares_of(module), -1)).transpose(1, 2)  # view [groups, columns, rows, ...]
    rows_of_share[inputs // size, inputs % size] = 0
    return masked


def masked_weights(groups: Sequence[NeuronGroup], gone: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """Qualified name -> weight of every layer that reads the neurons gone, with zeros where it reads them.

    A model that runs with these weights (`torch.func.functional_call`) computes what it does without the neurons.
    """
    lost: dict[str, list[Tensor]] = {}
    modules: dict[str, nn.Module] = {}
    for position, neurons in gone.items():
        for member in groups[position].of_role(CONSUMER):
            modules[member.name] = member.module
            lost.setdefault(member.name, []).append(member.index[neurons].flatten())
    return {
        tensor_name(name, "weight"): _without_columns(module, torch.cat(lost[name])) for name, module in modules.items()
    }


@torch.no_grad()
def dry_run(model: nn.Module, group: NeuronGroup, inputs: tuple[Any, ...]) -> None:
    """Check that removing neurons of a group equals setting to zero what their consumers read.

    Runs the model on `inputs` twice without changing it: with every second neuron cut, and with their columns zeroed.

    Raises:
        Refused: an operation fails, an output changes its shape, or the outputs differ.
    """
    if group.width < 2 * group.partitions:
        return
    rank = torch.empty(group.width, dtype=torch.int64)  # position of each neuron within its share
    for share in range(group.partitions):
        neurons = (group.partition == share).nonzero().flatten()
        rank[neurons] = torch.arange(len(neurons))
    gone = (rank % 2 == 0).nonzero().flatten()
    cuts = layer_cuts([group], {0: gone})
    masked = masked_weights([group], {0: gone})
    pruned = {name: cut.apply(tensor) for layer in cuts.values() for name, tensor, cut in layer.tensors()}
    expected = _tensors(functional_call(model, masked, inputs))
    try:
        with _depthwise_groups(cuts.values()):
            found = _tensors(functional_call(model, pruned, inputs))
    except (RuntimeError, ValueError, IndexError) as error:
        raise Refused(f"the network does not run after a trial cut ({str(error).splitlines()[0][:120]})") from error
    for a, b in zip(expected, found):
        if a.shape != b.shape:
            raise Refused("it is an output of the model")
        if not torch.allclose(a, b, rtol=0, atol=_DRY_RUN_TOLERANCE * float(a.abs().max() + 1e-12), equal_nan=True):
            raise Refused("a trial cut changed the function of the other neurons (an operation mixes channels)")


@contextmanager
def _depthwise_groups(cuts: Iterable[LayerCut]) -> Iterator[None]:
    """Depthwise convolutions with as many groups as channels are kept, for the time of a trial run."""
    changed = [(cut.module, shares_of(cut.module)) for cut in cuts if is_depthwise(cut.module)]
    try:
        for cut in cuts:
            if isinstance(cut.module, nn.Conv2d) and is_depthwise(cut.module) and cut.outputs is not None:
                cut.module.groups = len(cut.outputs)
        yield
    finally:
        for module, groups in changed:
            module.groups = groups  # type: ignore[assignment]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.float()]
    if isinstance(value, Mapping):
        value = value.values()
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, Iterable) else []
