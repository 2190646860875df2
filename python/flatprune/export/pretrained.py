"""Configurations of Hugging Face models after pruning: numbers of which `from_pretrained` builds the pruned shapes."""

from __future__ import annotations

import copy
import heapq
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flatprune.coupling.example_inputs import example_calls

_MOST_BUILDS = 500  # networks without memory that are built in search of a configuration
_BUILDS_ON = 50  # after the first that fits, in search of one whose modules hold the same numbers too
_OF_SIZE = re.compile(r"dim|size|inner|width|ff|head|channel|embd")
_NO_WIDTHS = re.compile(r"label2id|id2label|\w+_token_id|vocab_size|num_labels")

Place = tuple[Any, ...]  # keys that lead to an integer of a configuration as nested dicts and lists


class Change(NamedTuple):
    """An integer of a configuration and another value for it."""

    place: Place
    value: int


class Outline(NamedTuple):
    """What is compared of two networks.

    Attributes:
        shapes: of every tensor of the state dict.
        numbers: (module, attribute) -> integer, float or tuple of integers that the module holds.
    """

    shapes: dict[str, tuple[int, ...]]
    numbers: dict[tuple[str, str], Any]

    @classmethod
    def of(cls, model: nn.Module) -> Outline:
        """That of a network, which may be without memory."""
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        numbers = {
            (name, key): value
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if type(value) in (int, float) or (type(value) is tuple and all(type(item) is int for item in value))
        }
        return cls(shapes, numbers)

    def other_shapes(self, other: Outline) -> list[str]:
        """Tensors whose shape is not that of `other`."""
        return [name for name in {**self.shapes, **other.shapes} if self.shapes.get(name) != other.shapes.get(name)]

    def other_numbers(self, other: Outline) -> int:
        """How many attributes that both have differ."""
        return sum(value != other.numbers.get(key, value) for key, value in self.numbers.items())


def update_config(model: nn.Module, example_inputs: Any = None) -> dict[str, tuple[int | None, int]]:
    """Set the integers of a pruned Hugging Face model's `config` so that `from_pretrained` builds its shapes.

    `intermediate_size`, `num_attention_heads`, `hidden_size`, `head_dim` and their like, whatever they are called:
    integers that fit a width which changed are tried until the class, built from the configuration, has every tensor
    in the pruned shape. Where several do, the one whose modules hold the same numbers (`scaling`, say) is taken.
    A configuration mostly has one number for all layers, so prune with `Pruner(tie_widths=True)`; some have none for
    what can go: exclude the heads where `head_dim` is the hidden size by their number (BERT, ViT).

    Args:
        model: with a `config` that has `to_dict` and `from_dict`, and of a class that is built of that alone.
        example_inputs: what the model can be called with, see `flatprune.coupling.find_coupling`; if given, the
            rebuilt model's outputs are compared with the model's too.

    Returns:
        Name of an integer -> (value before, value after); empty if the configuration fits already.

    Raises:
        TypeError: the model has no such configuration.
        ValueError: no configuration fits: names a tensor, its shape, and what the configuration gives. It is left as
            it was.

    Example:
        >>> pruner = Pruner(model, optimizer, curvature, example_inputs, target=target, total_steps=1000,
        ...                 tie_widths=True, exclude=[BertSelfAttention])
        >>> flatprune.update_config(model)  # after the last event
        {'intermediate_size': (3072, 1190)}
        >>> model.save_pretrained("pruned"); model = BertForMaskedLM.from_pretrained("pruned")
    """
    config: Any = getattr(model, "config", None)
    if not (hasattr(config, "to_dict") and hasattr(type(config), "from_dict")):
        raise TypeError(
            f"update_config: {type(model).__name__} has no config with to_dict and from_dict, expected a model of "
            "Hugging Face transformers"
        )
    search = _Search(model, config)
    fits = search.fitting()
    if not fits:
        raise ValueError(search.refusal())
    for changes in fits:
        if example_inputs is None or search.computes_the_same(changes, example_inputs):
            return search.commit(changes)
    raise ValueError(
        f"update_config: {type(config).__name__} gives the pruned shapes with {_text(fits[0])}, but its outputs "
        "differ from the model's"
    )


Changes = tuple[Change, ...]


class _Search:
    """Over changes of a configuration, nearest first."""

    def __init__(self, model: nn.Module, config: Any) -> None:
        self.model = model
        self.config = config
        self.plain: dict[str, Any] = self.config.to_dict()
        self.wanted = Outline.of(model)
        self.device, self.error = "meta", ""
        self.known: dict[frozenset[Change], Outline | None] = {}
        start = self.outline(())
        if start is None:  # reads a tensor's values while it is built
            self.device, self.known = "cpu", {}
            start = self.outline(())
        if start is None:
            raise ValueError(f"update_config: {type(model).__name__} cannot be built from its config ({self.error})")
        self.start = self.nearest = start

    def outline(self, changes: Changes) -> Outline | None:
        """That of the network which a changed configuration gives; None if it is refused."""
        key = frozenset(changes)
        if key not in self.known:
            try:
                with torch.random.fork_rng(devices=[]), torch.device(self.device):
                    self.known[key] = Outline.of(type(self.model)(self.changed(changes)))
            except Exception as error:  # whatever a constructor finds wrong with the numbers
                self.known[key], self.error = None, " ".join(str(error).split())
        return self.known[key]

    def changed(self, changes: Changes) -> Any:
        """A configuration as `from_pretrained` would read it."""
        plain = copy.deepcopy(self.plain)
        for place, value in changes:
            _inside(plain, place[:-1])[place[-1]] = value
        return type(self.config).from_dict(plain)

    def fitting(self) -> list[Changes]:
        """Changes that give the pruned shapes, those with the fewest other numbers first."""
        if not self.start.other_shapes(self.wanted):
            return [()]
        whole = self._effective(self._rescaled())
        found = self._nearest_first(whole)
        if not found:
            found = self._nearest_first([*whole, *self._effective(self._unset(), refused=False)])
        return found

    def _nearest_first(self, candidates: list[Change]) -> list[Changes]:
        count = itertools.count()
        queue: list[tuple[int, int, Changes]] = [(self._distance(self.start), next(count), ())]
        seen: set[frozenset[Change]] = set()
        found: dict[Changes, int] = {}
        last = _MOST_BUILDS
        while queue and len(self.known) < last:
            distance, _, changes = heapq.heappop(queue)
            taken = {change.place for change in changes}
            for candidate in candidates:
                more = (*changes, candidate)
                if candidate.place in taken or frozenset(more) in seen:
                    continue
                seen.add(frozenset(more))
                outline = self.outline(more)
                further = distance + 1 if outline is None else self._distance(outline)
                heapq.heappush(queue, (further, next(count), more))
                if outline is None:
                    continue
                if further < self._distance(self.nearest):
                    self.nearest = outline
                if not outline.other_shapes(self.wanted):
                    last = min(last, len(self.known) + _BUILDS_ON)
                    found[more] = outline.other_numbers(self.wanted)
                    if found[more] == 0:
                        return [more]
        return sorted(found, key=lambda changes: (found[changes], len(changes)))

    def _distance(self, outline: Outline) -> int:
        return len(outline.other_shapes(self.wanted)) + outline.other_numbers(self.wanted)

    def _effective(self, candidates: Iterator[Change], *, refused: bool = True) -> list[Change]:
        """Candidates that alone change a shape that is wrong, or numbers only; `refused`: the impossible ones too."""
        wrong = self.start.other_shapes(self.wanted)
        kept = []
        for candidate in candidates:
            outline = self.outline((candidate,))
            if outline is None:
                useful = refused
            else:
                moved = outline.other_shapes(self.start)
                useful = outline.shapes.keys() == self.start.shapes.keys() and (
                    not set(wrong).isdisjoint(moved) or (not moved and outline != self.start)
                )
            if useful:
                kept.append(candidate)
        return kept

    def _sizes(self) -> set[tuple[int, int]]:
        """(before, after) of the dimensions that changed."""
        return {
            (before, after)
            for name, shape in self.start.shapes.items()
            for before, after in zip(shape, self.wanted.shapes.get(name, ()))
            if before != after
        }

    def _rescaled(self) -> Iterator[Change]:
        """Integers that are a width which changed, a part or a multiple of it, changed in proportion."""
        sizes = sorted(self._sizes())
        for place, value in _numbers(self.plain):
            if value is None or value < 2:
                continue
            fit = [s for s in sizes if max(value, s[0]) % min(value, s[0]) == 0 and value * s[1] % s[0] == 0]
            yield from (Change(place, scaled) for scaled in sorted({value * after // before for before, after in fit}))

    def _unset(self) -> Iterator[Change]:
        """Numbers that follow from others as long as they are not given: `n_inner`, `head_dim`."""
        after = {size for _, size in self._sizes()}
        held: dict[str, set[int]] = {}
        for (_, key), value in self.wanted.numbers.items():
            if type(value) is int:
                held.setdefault(key, set()).add(value)
        for place, value in _numbers(self.plain):
            if value is None and _OF_SIZE.search(str(place[-1])):
                yield from (Change(place, size) for size in sorted(held.get(place[-1], after)))

    def refusal(self) -> str:
        """Why no configuration fits."""
        kind, name = type(self.config).__name__, self.nearest.other_shapes(self.wanted)[0]
        message = (
            f"update_config: no numbers of {kind} give {name!r} the shape {self.wanted.shapes.get(name)}, the nearest "
            f"give {self.nearest.shapes.get(name)}"
        )
        like = re.sub(r"\d+", "#", name)
        for other, shape in self.wanted.shapes.items():
            alike = re.sub(r"\d+", "#", other) == like and self.start.shapes.get(other) == self.start.shapes.get(name)
            if alike and shape != self.wanted.shapes[name]:
                return f"{message}, and {other!r} has {shape}; prune with tie_widths=True to keep layers alike"
        return f"{message} ({self.error})" if self.error else message

    @torch.no_grad()
    def computes_the_same(self, changes: Changes, example_inputs: Any) -> bool:
        """Whether a network of the changed configuration and the pruned tensors has the same outputs."""
        with torch.random.fork_rng(devices=[]):
            fresh = type(self.model)(self.changed(changes))
        first = next(self.model.parameters())
        fresh.to(device=first.device, dtype=first.dtype).load_state_dict(self.model.state_dict())
        training = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            calls = example_calls(self.model, example_inputs)
            pairs = [(_tensors(call.run(self.model)), _tensors(call.run(fresh.eval()))) for call in calls]
        finally:
            for module, mode in training.items():
                module.training = mode
        return all(len(own) == len(other) and all(map(_near, own, other)) for own, other in pairs)

    def commit(self, changes: Changes) -> dict[str, tuple[int | None, int]]:
        """Give the model's configuration the changed numbers, and those that it computes of them."""
        before, after = dict(_numbers(self.plain)), dict(_numbers(self.changed(changes).to_dict()))
        changed: dict[str, tuple[int | None, int]] = {}
        for place, value in after.items():
            if value is not None and value != before.get(place):
                holder = _inside(self.config, place[:-1])
                if isinstance(holder, (list, dict)):
                    holder[place[-1]] = value
                else:
                    setattr(holder, place[-1], value)
                changed[".".join(map(str, place))] = (before.get(place), value)
        return changed


def _numbers(plain: Any, place: Place = ()) -> Iterator[tuple[Place, int | None]]:
    """Integers of nested dicts and lists, and what is None there."""
    for key, value in plain.items() if isinstance(plain, dict) else enumerate(plain):
        if isinstance(key, str) and _NO_WIDTHS.fullmatch(key):
            continue
        if isinstance(value, (dict, list)):
            yield from _numbers(value, (*place, key))
        elif type(value) is int or value is None:
            yield (*place, key), value
    if isinstance(plain, dict) and "hidden_size" in plain and "head_dim" not in plain:
        yield (*place, "head_dim"), None  # many models read it where it is given, though their configurations have none


def _inside(holder: Any, place: Place) -> Any:
    for key in place:
        holder = holder[key] if isinstance(holder, (dict, list)) else getattr(holder, key)
    return holder


def _tensors(output: Any) -> list[Tensor]:
    """Floating tensors of an output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    return [t for item in output for t in _tensors(item)] if isinstance(output, (list, tuple)) else []


def _near(one: Tensor, other: Tensor) -> bool:
    scale = float(one.abs().max()) if one.numel() else 0.0
    return one.shape == other.shape and torch.allclose(one, other, rtol=0.0, atol=1e-3 * scale + 1e-12)


def _text(changes: Changes) -> str:
    return ", ".join(f"{'.'.join(map(str, place))}={value}" for place, value in changes)
