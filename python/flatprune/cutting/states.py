"""What optimizers keep of each parameter, wherever they keep it, and cutting it along with the parameter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_leaves, tree_map_with_path

from flatprune.coupling import Cut, NeuronGroup
from flatprune.cutting.layouts import FLAT, NotCuttableError, chosen_layout, cut_state, cuts_along, refusal, tensors_in
from flatprune.cutting.optimizers import parameters_of
from flatprune.cutting.rehearsal import Seen, rehearse


class Slot(NamedTuple):
    """Where an optimizer keeps something of one parameter.

    Attributes:
        parameter: the parameter.
        holder, key: `holder[key]` is what it keeps: a tensor, or a list or dict with tensors in it.
        label: what a message calls it, such as "state 'exp_avg' of Adam".
        where: the key as a path, by which a rehearsal knows it.
        optimizer: whose it is.
    """

    parameter: Tensor
    holder: Any
    key: Any
    label: str
    where: str
    optimizer: torch.optim.Optimizer


def slots(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[Slot]:
    """Everything that the optimizers keep of single parameters, once each.

    That is their `state`; attributes and group options that map parameters to tensors, or that list one tensor for each
    parameter in order (slow weights, masks); and what other attributes hold, of no parameter (see `check_states`).
    """
    known: set[int] = set()
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        held = {id(p) for p in parameters_of([optimizer])}
        for parameter, state in optimizer.state.items():
            if id(parameter) in held and id(state) not in known:
                known.add(id(state))
                for key in state:
                    yield Slot(parameter, state, key, f"state {key!r} of {kind}", f"[{key!r}]", optimizer)
        for number, group in enumerate(optimizer.param_groups):
            for key, value in group.items():
                if _is_parallel(value, group["params"]):
                    label = f"option {key!r} of group {number} of {kind}"
                    yield from _parallel(value, group["params"], label, optimizer)
        for key, value in _own_attributes(optimizer).items():
            yield from _of_attribute(value, f"attribute {key!r} of {kind}", optimizer, held)


def keeps_tensors(optimizers: Iterable[torch.optim.Optimizer]) -> bool:
    """Whether they keep any tensor of a parameter, of more than one entry: something that would have to be cut."""
    leaves = (leaf for slot in slots(optimizers) for leaf in tree_leaves(slot.holder[slot.key]))
    return any(isinstance(leaf, Tensor) and leaf.numel() > 1 for leaf in leaves)


def rehearsed(model: nn.Module, groups: Sequence[NeuronGroup], optimizers: Iterable[torch.optim.Optimizer]) -> Seen:
    """How the states of all parameters that may lose neurons are going to lie, see `flatprune.cutting.rehearsal`.

    Raises:
        ValueError: an optimizer will make states that cannot be cut; names the parameter and the state.
    """
    own, seen = dict(model.named_parameters()), Seen()
    parameters = {name: own[name] for name in _possible_cuts(own, groups)}
    for optimizer in optimizers:
        rehearse(optimizer, parameters, seen)
    return seen


def check_states(
    model: nn.Module,
    groups: Sequence[NeuronGroup],
    optimizers: Sequence[torch.optim.Optimizer],
    seen: Seen,
) -> None:
    """Refuse optimizers that keep what cannot be cut of a parameter that may lose neurons.

    Args:
        model: the network.
        groups: its neurons that may go.
        optimizers: all of them.
        seen: what `rehearsed` returned.

    Raises:
        ValueError: naming the parameter, the state or attribute, its shape or type, and what is wanted.
    """
    own = dict(model.named_parameters())
    cuts = _possible_cuts(own, groups)
    names = {id(own[name]): name for name in cuts}
    known = {id(tensor) for tensor in [*model.parameters(), *model.buffers(), *parameters_of(optimizers)]}
    for optimizer in optimizers:
        _refuse_loose(optimizer, known)
    for slot in slots(optimizers):
        name = names.get(id(slot.parameter))
        if name is not None:
            _mapped(name, slot, cuts[name], seen, cutting=False)


def cut_states(
    own: Mapping[str, Tensor],
    cuts: Mapping[str, Sequence[Cut]],
    optimizers: Sequence[torch.optim.Optimizer],
    seen: Seen,
) -> list[tuple[Any, Any, Any]]:
    """(holder, key, new value) of everything that is cut along with a parameter; nothing is changed.

    Args:
        own: name -> parameter or buffer of the model.
        cuts: name -> what stays of it.
        optimizers: all of them.
        seen: what `rehearsed` returned.

    Raises:
        ValueError: as `check_states`.
    """
    names = {id(own[name]): name for name in cuts}
    found = []
    for slot in slots(optimizers):
        name = names.get(id(slot.parameter))
        if name is not None:
            found.append((slot.holder, slot.key, _mapped(name, slot, cuts[name], seen, cutting=True)))
    return found


def _possible_cuts(own: Mapping[str, Tensor], groups: Sequence[NeuronGroup]) -> dict[str, list[Cut]]:
    """Name of a parameter -> along what it may be cut; which entries stay does not count here."""
    cuts: dict[str, list[Cut]] = {}
    for member in (member for group in groups for member in group.members):
        if member.name in own:
            cuts.setdefault(member.name, []).append(Cut(member.dim, member.groups, member.index, member.size))
    return cuts


def _mapped(name: str, slot: Slot, cuts: Sequence[Cut], seen: Seen, *, cutting: bool) -> Any:
    """What a slot holds, its tensors cut; only judged, and None, without `cutting`."""
    shape, dims = slot.parameter.shape, {cut.dim for cut in cuts}

    def along(path: Any, leaf: Any) -> Any:
        if not tensors_in(leaf):
            return leaf
        key = (id(slot.optimizer), len(shape), slot.where + keystr(path))
        try:
            layout = chosen_layout(leaf, shape, dims, seen.get(key, frozenset()))
            if cutting:
                return cut_state(leaf, layout, shape, cuts)
            return None if layout == FLAT else cuts_along(layout, cuts)
        except NotCuttableError as error:
            raise refusal(name, slot.label, error) from error

    mapped = tree_map_with_path(along, slot.holder[slot.key])
    return mapped if cutting else None


def _own_attributes(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Attributes of an optimizer that are not torch's own, and that are containers or tensors."""
    torchs = {"state", "param_groups", "defaults"}
    return {
        key: value
        for key, value in vars(optimizer).items()
        if key not in torchs and not key.startswith("_optimizer_") and isinstance(value, (Tensor, list, tuple, dict))
    }


def _is_parallel(value: Any, parameters: Sequence[Tensor]) -> bool:
    """Whether a list holds one tensor for each parameter in order, and not the parameters themselves."""
    return (
        isinstance(value, list)
        and len(value) == len(parameters)
        and all(isinstance(v, Tensor) and v is not p for v, p in zip(value, parameters))
    )


def _parallel(
    value: list[Any], parameters: Sequence[Tensor], label: str, optimizer: torch.optim.Optimizer
) -> Iterator[Slot]:
    for index, parameter in enumerate(parameters):
        yield Slot(parameter, value, index, label, "", optimizer)


def _of_attribute(value: Any, label: str, optimizer: torch.optim.Optimizer, held: set[int]) -> Iterator[Slot]:
    groups = [group["params"] for group in optimizer.param_groups]
    if isinstance(value, dict):
        for key in value:
            if isinstance(key, Tensor) and id(key) in held:
                yield Slot(key, value, key, label, "", optimizer)
    elif _is_parallel(value, [parameter for group in groups for parameter in group]):
        yield from _parallel(value, [parameter for group in groups for parameter in group], label, optimizer)
    elif isinstance(value, list) and len(value) == len(groups):
        for inner, group in zip(value, groups):
            if _is_parallel(inner, group):
                yield from _parallel(inner, group, label, optimizer)


def _refuse_loose(optimizer: torch.optim.Optimizer, known: set[int]) -> None:
    """Raise ValueError for tensors in attributes or options, or under other keys of the state, that are of no slot."""
    held = {id(p) for p in parameters_of([optimizer])}
    reached = {id(leaf) for slot in slots([optimizer]) for leaf in tree_leaves(slot.holder[slot.key])}
    kind = type(optimizer).__name__
    places = {f"attribute {key!r} of {kind}": value for key, value in _own_attributes(optimizer).items()}
    places |= {f"state {key!r} of {kind}": v for key, v in optimizer.state.items() if id(key) not in held}
    for number, group in enumerate(optimizer.param_groups):
        places |= {f"option {key!r} of group {number} of {kind}": v for key, v in group.items() if key != "params"}
    for label, value in places.items():
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor) and leaf.numel() > 1 and id(leaf) not in known | reached:
                raise ValueError(
                    f"{label} holds a tensor of shape {tuple(leaf.shape)} that is of no single parameter, so that it "
                    "cannot be cut; expected states of parameters in the optimizer's state"
                )
