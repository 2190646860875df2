"""Networks of a few channels, and which of their entries must go together, in a few lines a test.

A group is written as a dict from what its neurons own to the entries of each neuron, in the order of its neurons:

    check(
        Net(lambda m, x: m.out(m.a(x)), a=nn.Linear(5, 4), out=nn.Linear(4, 3)),
        torch.randn(2, 5),
        {"a": range(4), "out.weight[1]": range(4)},
        refused={"out": "output of the model"},
    )

"out.weight[1]" is dimension 1 of a tensor, "a" is short for dimension 0 of all tensors of a layer; entries are one
integer or several. "slices" (if any) is the slice of each neuron.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatprune.coupling import find_coupling

Neuron = frozenset  # of (what, entries)


class Net(nn.Module):
    """Layers, parameters and integers by name and a forward that is a function of the module and the inputs."""

    def __init__(self, forward: Any, **parts: Any) -> None:
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(self, *args, **kwargs)


def conv(inputs: int, outputs: int, size: int = 3, **options: Any) -> nn.Conv2d:
    """A convolution that keeps the size of its input."""
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


def pooled(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C]."""
    return x.mean((2, 3))


def image(channels: int = 3, size: int = 6) -> Tensor:
    return torch.randn(2, channels, size, size)


def rows(count: int, stride: int, pieces: int = 2, start: int = 0) -> list[tuple[int, ...]]:
    """Entries i, i + stride, ... of neuron i: equal pieces of one layer, such as the halves of a gate."""
    return [tuple(start + i + stride * piece for piece in range(pieces)) for i in range(count)]


def blocks(count: int, size: int, start: int = 0) -> list[tuple[int, ...]]:
    """Entries i size ... (i + 1) size - 1 of neuron i: positions of a channel behind a flatten, channels of a head."""
    return [tuple(range(start + i * size, start + (i + 1) * size)) for i in range(count)]


def joined(*parts: Iterable) -> list[tuple[int, ...]]:
    """Neuron by neuron the entries of several lists."""
    return [tuple(entry for own in neuron for entry in _entries(own)) for neuron in zip(*map(list, parts))]


def _entries(value: Any) -> tuple[int, ...]:
    return (int(value),) if isinstance(value, int) else tuple(map(int, value))


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> its first one."""
    first: dict[int, str] = {}
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: first.setdefault(id(tensor), name) for name, tensor in tensors}


def _expanded(model: nn.Module, what: str, names: Mapping[str, str]) -> list[str]:
    """The tensors that "a" or "a.weight[1]" stands for."""
    if what.endswith("]"):
        tensor, _, dim = what[:-1].rpartition("[")
        return [f"{names[tensor]}[{dim}]"]
    layer = model.get_submodule(what)
    own = {**layer._parameters, **layer._buffers}
    return [f"{names[f'{what}.{key}']}[0]" for key, t in own.items() if t is not None and t.dim()]


def expected_neurons(model: nn.Module, group: Mapping[str, Any]) -> list[Neuron]:
    names = _first_names(model)
    owned: dict[str, list[set[int]]] = {}
    for what, index in group.items():
        if what != "slices":
            for key in _expanded(model, what, names):
                found = [set(_entries(entries)) for entries in index]
                owned[key] = [a | b for a, b in zip(owned.get(key, found), found)]
    assert len({len(index) for index in owned.values()}) == 1, f"the test gives different numbers of neurons: {owned}"
    return [frozenset((key, tuple(sorted(own))) for key, own in zip(owned, neuron)) for neuron in zip(*owned.values())]


def found_neurons(model: nn.Module, group: Any) -> list[Neuron]:
    names = _first_names(model)
    neurons: list[dict[str, set[int]]] = [{} for _ in range(group.width)]
    for member in group.members:
        for neuron, entries in zip(neurons, member.index.tolist()):
            neuron.setdefault(f"{names[member.names[0]]}[{member.dim}]", set()).update(entries)
    return [frozenset((key, tuple(sorted(own))) for key, own in neuron.items()) for neuron in neurons]


def slices(neurons: Sequence[Neuron], numbers: Iterable[int]) -> set[frozenset]:
    numbers = [int(number) for number in numbers]
    return {frozenset(n for n, own in zip(neurons, numbers) if own == number) for number in set(numbers)}


def written(neurons: Iterable[Neuron]) -> str:
    """Neurons for a message of a failing test, a tensor a line."""
    owned: dict[str, list[tuple[int, ...]]] = {}
    for neuron in sorted(neurons, key=sorted):
        for key, entries in sorted(neuron):
            owned.setdefault(key, []).append(entries)
    return "\n".join(f"    {key}: {index}" for key, index in owned.items())


def check(
    model: nn.Module,
    inputs: Any,
    *groups: Mapping[str, Any],
    refused: Mapping[str, str | Sequence[str]] | None = None,
    exclude: Sequence[str | type] = (),
) -> Any:
    """The groups of a network are exactly these; the reasons for other layers hold the words given."""
    coupling = find_coupling(model, inputs, exclude=exclude)
    found = {frozenset(found_neurons(model, group)): group for group in coupling.groups}
    for group in groups:
        neurons = expected_neurons(model, group)
        assert frozenset(neurons) in found, (
            f"expected\n{written(neurons)}\n  found\n"
            + "\n  and\n".join(map(written, found))
            + f"\n  refused {coupling.refused}"
        )
        match = found.pop(frozenset(neurons))
        first = next(iter(group))
        assert first.endswith("]") or match.name.partition("#")[0] == first
        wanted = slices(neurons, group.get("slices", [0] * len(neurons)))
        assert match.groups == len(wanted)
        assert slices(found_neurons(model, match), match.group_of.tolist() or [0] * match.width) == wanted
    assert not found, "found too\n" + "\n  and\n".join(map(written, found))
    for layer, words in (refused or {}).items():
        assert layer in coupling.refused, f"{layer} is not among {coupling.refused}"
        for word in [words] if isinstance(words, str) else words:
            assert word in coupling.refused[layer], f"{layer}: {coupling.refused[layer]!r} lacks {word!r}"
    return coupling
