"""What traces of a network find out: which labels go together, which must stay, and what shapes they must keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flatprune.coupling.neurons import tensor_name
from flatprune.coupling.values import JOINT, Axis, labels_of, varying


class AxisTable:
    """The axes of a model's parameters and buffers, made as traces meet them; labels are numbered through.

    Args:
        model: tensors are known by identity, so tied weights and functional use need no rule.

    Attributes:
        frozen: no labels are made any more: what a later run meets first, an expert say, has negative ones.
    """

    def __init__(self, model: nn.Module) -> None:
        self.axes: list[Axis] = []
        self.next_node = 1
        self.joints: dict[bytes, int] = {}  # labels summed over -> the joint label that is left
        self.frozen = False
        self.tensors: dict[int, Tensor] = {}
        self.names: dict[int, list[str]] = {}
        self._found: dict[tuple[int, int, int], Axis] = {}
        for module_name, module in model.named_modules(remove_duplicate=False):
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self.tensors[id(tensor)] = tensor
                    self.names.setdefault(id(tensor), []).append(tensor_name(module_name, key))

    def axis(self, key: int, dim: int, size: int, groups: int = 1) -> Axis:
        """The axis of a tensor (by id) along `dim`."""
        found = self._found.get((key, dim, groups))
        if found is None and self.frozen:
            return Axis(tuple(self.names[key]), dim, -size, size, groups)
        if found is None:
            found = Axis(tuple(self.names[key]), dim, self.next_node, size, groups)
            self._found[key, dim, groups] = found
            self.next_node += size
            self.axes.append(found)
        return found

    def existing(self, key: int) -> list[Axis]:
        """All axes of a tensor (by id) so far."""
        return [axis for (owner, _, _), axis in self._found.items() if owner == key]

    def joint(self, rows: Tensor) -> Tensor:
        """The label of each entry that a sum over labels [entries, labels] leaves; the same sum leaves the same one."""
        keys = [row.tobytes() for row in rows.numpy()]
        if not self.frozen:
            for key in keys:
                self.joints.setdefault(key, JOINT + len(self.joints))
        return torch.tensor([self.joints.get(key, -1) for key in keys])

    def owners(self, labels: Tensor) -> list[Axis]:
        """The axes that labels belong to."""
        labels = labels[(labels > 0) & (labels < JOINT)]
        if len(labels) == 0:
            return []
        starts = torch.tensor([axis.start for axis in self.axes])
        places = torch.searchsorted(starts, labels, right=True) - 1
        return [self.axes[i] for i in places.unique().tolist()]


class Product(NamedTuple):
    """One product and sum.

    Attributes:
        module: that calls it.
        times: how often it is done: positions and entries of the kernel of a convolution, else 1.
        size: of the product before the sum; of a grouped convolution (groups, inputs and outputs of one).
        layers: labels along its dimensions, two dimensions of one layer in one entry.
        summed: the dimension of the sum.
        once: it is the same for any number of samples, such as a product of two parameters.
    """

    module: str
    times: int
    size: tuple[int, ...]
    layers: list[Tensor]
    summed: int
    once: bool = False


@dataclass
class Findings:
    """Gathered over all traces of one model.

    Attributes:
        hard: pairs [n, 2] of labels of the same entry.
        soft: (pairs, where): one label (first) broadcast over several, as a head over its channels; may be dropped.
        pins: (labels, why they cannot go).
        outputs: the reasons among them that are expected: outputs of the model.
        grids: (labels along two or more dimensions, where): what stays must be rectangular.
        slices: (labels [slices, entries], where): all slices stay, equally large.
        splits: pairs at the same place of equal pieces, which code may ask for (chunk).
        statistics: (labels, where) of each statistic over channels.
        joint_norms: (labels, where) of norms whose statistics run over channels.
        read: labels that a product of activations sums over.
        roles: (layer, role) of parameters.
        multiples: (labels, m): a width of which a kernel takes only multiples.
        products: every product and sum, for counting multiply-accumulates.
    """

    hard: list[Tensor] = field(default_factory=list)
    soft: list[tuple[Tensor, str]] = field(default_factory=list)
    pins: list[tuple[Tensor, str]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    grids: dict[bytes, tuple[Tensor, str]] = field(default_factory=dict)
    slices: list[tuple[Tensor, str]] = field(default_factory=list)
    splits: list[Tensor] = field(default_factory=list)
    statistics: list[tuple[Tensor, str]] = field(default_factory=list)
    joint_norms: list[tuple[Tensor, str]] = field(default_factory=list)
    read: list[Tensor] = field(default_factory=list)
    roles: list[tuple[Tensor, str]] = field(default_factory=list)
    multiples: list[tuple[Tensor, int]] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)

    def pin(self, layer: Tensor, why: str) -> None:
        """These labels cannot go."""
        labels = labels_of(layer)
        if len(labels):
            self.pins.append((labels, why))

    def edge(self, coarse: Tensor, fine: Tensor, where: str, *, soft: bool = False) -> None:
        """Labels at the same place are one; of a soft edge `coarse` is broadcast over `fine`."""
        coarse, fine = torch.broadcast_tensors(coarse, fine)
        known = (coarse > 0) & (fine > 0) & (coarse != fine)
        if bool(known.any()):
            pairs = torch.stack([coarse[known], fine[known]], dim=1)
            if soft:
                self.soft.append((pairs, where))
            else:
                self.hard.append(pairs)
        for one, other in ((coarse, fine), (fine, coarse)):
            fixed = (one == -1) & (other > 0)
            if bool(fixed.any()):
                self.pin(other[fixed], f"it is joined with entries that cannot go ({where})")

    def grid(self, layer: Tensor, where: str) -> None:
        """Labels along several dimensions: whatever goes must leave a rectangle."""
        if len(varying(layer)) > 1:
            array = layer.squeeze().contiguous()
            key = array.numpy().tobytes() + str(tuple(array.shape)).encode()
            self.grids.setdefault(key, (array, where))

    def split(self, pieces: Sequence[Tensor]) -> None:
        """Equal pieces of one tensor: entries at the same place could go together."""
        first = pieces[0].reshape(-1)
        pairs = torch.cat([torch.stack([first, piece.reshape(-1)], dim=1) for piece in pieces[1:]])
        pairs = pairs[(pairs > 0).all(dim=1)]
        if len(pairs):
            self.splits.append(pairs)


class NoFindings(Findings):
    """For a run that only follows labels."""

    def pin(self, layer: Tensor, why: str) -> None:
        """Nothing."""

    def edge(self, coarse: Tensor, fine: Tensor, where: str, *, soft: bool = False) -> None:
        """Nothing."""

    def grid(self, layer: Tensor, where: str) -> None:
        """Nothing."""

    def split(self, pieces: Sequence[Tensor]) -> None:
        """Nothing."""


def storage_keys(tensors: Mapping[int, Tensor]) -> dict[tuple[object, ...], int]:
    """Place in memory -> id of a parameter or buffer, to know it behind `.data` and `detach`."""
    return {storage_key(tensor): key for key, tensor in tensors.items()}


def storage_key(tensor: Tensor) -> tuple[object, ...]:
    """Where a tensor lies in memory; of its own where it has no address."""
    try:
        return tensor.data_ptr() or id(tensor), tuple(tensor.shape), tensor.stride()
    except RuntimeError:
        return (id(tensor),)
