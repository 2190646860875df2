"""Which tensors of a network are coupled: traced, connected, read off as neurons, proven."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatprune.coupling.attention import make_prunable, undo_prunable
from flatprune.coupling.calls import first_lines, traced_mode, unchanged
from flatprune.coupling.components import OUTPUT, Candidate, Components
from flatprune.coupling.constants import register_tensors, unregister_tensors
from flatprune.coupling.example_inputs import GIVE, described, example_calls
from flatprune.coupling.findings import AxisTable, Findings
from flatprune.coupling.neurons import CONSUMER, Coupling, tensor_name
from flatprune.coupling.operators.indexing import LOOKED_UP
from flatprune.coupling.products import mac_terms
from flatprune.coupling.slices import ACROSS
from flatprune.coupling.tracer import Chunks, ModuleStack, Tracer
from flatprune.coupling.trial import Trial
from flatprune.coupling.tried import TracedCall
from flatprune.coupling.unreached import couple_unreached
from flatprune.distributed import refuse_wrapped
from kfac_ext.curvature.modes import plain_kernels
from kfac_ext.curvature.recent import Call

_ROUNDS = 4  # of trial cuts with coarser neurons


def find_coupling(model: nn.Module, example_inputs: Any, exclude: Sequence[str | type] = ()) -> Coupling:
    """The groups of neurons of `model`, traced in evaluation and in training mode and proven by trial cuts.

    Every `nn.MultiheadAttention` gets a forward that follows the shapes of its tensors (see
    `flatprune.coupling.attention`), tensors that are plain attributes and must be cut become buffers; else the model is
    left as it was: modes, tensors, gradients, random streams.

    Args:
        model: any module that runs eagerly.
        example_inputs: a tensor, arguments, keywords, both, or calls that together reach everything, see
            `flatprune.coupling.example_inputs`; one or two samples do.
        exclude: layers whose outputs stay: qualified names (of a layer, or of a module that holds it) or types.

    Returns:
        The prunable groups in forward order, and why others stay.

    Raises:
        KeyError: `exclude` names a module that the model does not have.
        TypeError: `example_inputs` is no input but a loader, say.
        ValueError: the model cannot be called with the example inputs; names the module that raised.

    Example:
        >>> coupling = find_coupling(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4))
        >>> coupling.groups[0].name, coupling.groups[0].width
        ('0', 8)
    """
    refuse_wrapped(model, "find_coupling")
    _check_exclude(model, exclude)
    changed, registered = make_prunable(model), register_tensors(model)
    try:
        found = _Search(model, example_inputs, exclude).coupling()
    except BaseException:
        undo_prunable(changed)
        unregister_tensors(registered)
        raise
    cut = {name for group in found.groups for member in group.members for name in member.names}
    names = {module: name for name, module in model.named_modules()}
    unregister_tensors([place for place in registered if tensor_name(names[place[0]], place[1]) not in cut])
    return found


class _Search:
    def __init__(self, model: nn.Module, example_inputs: Any, exclude: Sequence[str | type]) -> None:
        self.model, self.exclude = model, exclude
        self.modules = dict(model.named_modules())
        self.table, self.findings, self.stack = AxisTable(model), Findings(), ModuleStack(model)
        self.traced: list[TracedCall] = []
        self.called: set[str] = set()
        self.read_by_host: set[str] = set()
        for call in example_calls(model, example_inputs):
            for training in (False, True):
                self._trace(call, training)

    def _trace(self, call: Call, training: bool) -> None:
        known = len(self.findings.products)
        labels = Tracer(self.model, self.table, self.findings, self.stack)
        with unchanged(self.model), plain_kernels(), traced_mode(self.model, training), self.stack.watching():
            try:
                with labels, Chunks(labels):
                    output = call.run(self.model)
            except Exception as error:
                mode = "training" if training else "evaluation"
                raise ValueError(
                    f"example_inputs: the model's forward raises in {mode} mode, in {self.stack.here} "
                    f"({first_lines(error)}), given {described(call)}; {GIVE}"
                ) from error
            labels.note_outputs(output)
        self.called |= labels.called
        self.read_by_host |= labels.read_by_host
        if not self.traced:
            self.samples = max(1, next((len(t) for t in call.tensors() if t.dim()), 1))
            self.products = self.findings.products[known:]
        self.findings.products.clear()
        self.traced.append(TracedCall(call, training))

    def coupling(self) -> Coupling:
        """Try candidates; what fails is tried with coarser neurons, else refused."""
        more, unsafe = couple_unreached(
            self.model, Components(self.table, self.findings), self.called, self.read_by_host
        )
        components = self._balanced(more)
        self.table.frozen = True
        for left in reversed(range(_ROUNDS + 1)):
            trial, failed, reasons = self._tried(components, unsafe)
            coarser = _coarser_pairs(components, trial, failed) if left else []
            if not coarser:
                break
            components = self._balanced([*components.more, *coarser])
        attributes = {components.candidates[p].group.name: found for p, found in trial.attributes.items()}
        return self._result(components, reasons, attributes)

    def _balanced(self, more: Sequence[Tensor]) -> Components:
        """The components of these further pairs, and of those that leave slices equal."""
        components = Components(self.table, self.findings, more)
        for _ in range(_ROUNDS):
            if not components.balances:
                break
            components = Components(self.table, self.findings, [*components.more, *components.balances])
        return components

    def _tried(self, components: Components, unsafe: dict[int, str]) -> tuple[Trial, dict[int, str], dict[int, str]]:
        """A trial of all candidates, those that failed it, and the reasons why these and others stay."""
        trial = Trial(self.model, self.traced, components)
        reasons = {p: why for p, c in enumerate(components.candidates) if (why := self._excluded(c, unsafe))}
        failed = trial.prove([p for p in range(len(components.candidates)) if p not in reasons])
        return trial, failed, {**reasons, **failed}

    def _excluded(self, candidate: Candidate, unsafe: dict[int, str]) -> str:
        for member in candidate.group.members:
            if member.roles == {CONSUMER}:
                continue
            for item in self.exclude:
                if isinstance(item, type):
                    hit = any(isinstance(self.modules[name], item) for name in _around(member.module))
                else:
                    hit = item == "" or any(
                        (owner + ".").startswith(item + ".") for owner in (member.module, member.name)
                    )
                if hit:
                    return _EXCLUDED
        for member in candidate.group.members:
            if member.size in unsafe or member.size // member.groups in unsafe:
                return unsafe.get(member.size) or unsafe[member.size // member.groups]
        return ""

    def _result(self, components: Components, reasons: dict[int, str], attributes: dict[str, Any]) -> Coupling:
        found = Coupling(attributes=attributes, attention=bool(self.table.joints))
        for position, candidate in enumerate(components.candidates):
            if position in reasons:
                why = reasons[position]
                found.refuse(candidate.group.producers(), why, expected=why == _EXCLUDED)
            else:
                found.groups.append(candidate.group)
        kept = [position for position in range(len(components.candidates)) if position not in reasons]
        found.macs = mac_terms(self.products, components, kept, self.samples)
        for layers, why in components.refused:
            found.refuse(layers, why, expected=why == OUTPUT or why.startswith((LOOKED_UP, ACROSS)))
        return found


_EXCLUDED = "it is excluded"


def _coarser_pairs(components: Components, trial: Trial, failed: Iterable[int]) -> list[Tensor]:
    """Pairs of labels to go together, so that what failed may pass; empty if there is nothing left to try."""
    pairs = [pair for p in failed for pair in _coarser(components, components.candidates[p])]
    return pairs or [pair for p in failed for q in trial.partners.get(p, ()) for pair in _tied(components, p, q)]


def _coarser(components: Components, candidate: Candidate) -> list[Tensor]:
    """Pairs that make neurons of a candidate coarser: equal pieces, or equal ranks of its slices, go together."""
    inside = torch.zeros(components.total, dtype=torch.bool)
    inside[candidate.labels] = True
    found = []
    for pairs in components.findings.splits:
        flat = components.flat(pairs)
        touched = inside[flat].any(dim=1)
        apart = components.component[flat[:, 0]] != components.component[flat[:, 1]]
        if bool((touched & apart).any()):
            found.append(flat)
    group = candidate.group
    if group.groups > 1:
        first, *others = ((group.group_of == part).nonzero().flatten() for part in range(group.groups))
        for other in others:
            labels = candidate.first_labels()
            found.append(torch.stack([labels[first], labels[other]], dim=1))
    return found


def _tied(components: Components, one: int, other: int) -> list[Tensor]:
    """Pairs that make one of two candidates whose widths the code takes for equal (or one for a multiple)."""
    narrow, wide = (components.candidates[p] for p in (one, other))
    times, rest = divmod(wide.group.width, narrow.group.width)
    if one == other or rest or not times or (times == 1 and one > other):
        return []
    return [torch.stack([narrow.first_labels().repeat_interleave(times), wide.first_labels()], dim=1)]


def _around(module: str) -> list[str]:
    """A module and all that hold it, without the model itself."""
    parts = module.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _check_exclude(model: nn.Module, exclude: Sequence[str | type]) -> None:
    known = {*dict(model.named_modules()), *dict(model.named_parameters())}
    for item in exclude:
        if isinstance(item, str) and item not in known:
            modules = ", ".join(name for name, _ in model.named_modules() if name)
            raise KeyError(f"exclude: the model has no module named {item!r}; it has {modules}")
