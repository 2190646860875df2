"""What is measured of one network: what could go, whether a cut is what masking is, whether training goes on after."""

from __future__ import annotations

import copy
import math
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import flatprune
from bench.zoo.gaps import Gaps, open_gaps, plainly
from bench.zoo.network import Inputs, Network, by_position, call
from flatprune.coupling import Coupling, NeuronGroup, find_coupling
from flatprune.cutting.surgery import plan

Record = dict[str, Any]
Pruned = Mapping[int, Tensor]
Amount = Callable[[int, torch.Generator], int]
ALLOWED = 1e-5  # difference of cut and masked, as a share of what masking changes
ROUNDING = 8  # units in the last place of the largest output, which sums in another order are off by
STEPS, BATCH = 10, 4


@contextmanager
def timed(record: Record) -> Iterator[None]:
    """Note seconds and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    record["seconds"] = round(time.perf_counter() - wall, 3)
    record["cpu"] = round(time.process_time() - cpu, 3)


# what could go


def find(network: Network) -> tuple[Coupling, Record]:
    """The groups of a network, which share of its parameters they own, and why the rest stays."""
    record: Record = {}
    model = network.one_tensor()
    with timed(record):
        coupling = find_coupling(model, network.inputs(2))
    record["groups"] = len(coupling.groups)
    record["could_go"] = could_go(model, coupling.groups)
    record["refused"] = reasons(coupling)
    return coupling, record


def could_go(model: nn.Module, groups: list[NeuronGroup]) -> float:
    """The share of the parameters that some neuron owns."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    owned = {id(p): torch.zeros(p.shape, dtype=torch.bool) for p in parameters.values()}
    for member in (member for group in groups for member in group.members if member.names[0] in parameters):
        marks, entries = owned[id(parameters[member.names[0]])], member.index.flatten()
        if member.groups == 1:
            marks.index_fill_(member.dim, entries, True)
        else:
            size = marks.shape[member.dim]
            marks.unflatten(0, (member.groups, -1))[entries // size, :, entries % size] = True
    return sum(int(marks.sum()) for marks in owned.values()) / max(1, sum(marks.numel() for marks in owned.values()))


def reasons(coupling: Coupling) -> dict[str, int]:
    """Reason -> how many layers stay for it, most first; names and numbers of layers are left out."""
    found = (reason for name, reason in coupling.refused.items() if name not in coupling.expected)
    return dict(Counter(re.sub(r"'[^']*'", "…", reason) for reason in found).most_common())


# a cut against the masked network


def part_of_each(groups: list[NeuronGroup], amount: Amount, seed: int = 0) -> dict[int, Tensor]:
    """Random neurons of the groups: of each slice of n neurons about `amount(n)`, so that the width is allowed."""
    generator = torch.Generator().manual_seed(seed)
    pruned = {}
    for position, group in enumerate(groups):
        slices = [(group.group_of == part).nonzero().flatten() for part in range(group.groups)]
        allowed = [n for n in range(1, len(slices[0])) if (group.width - n * group.groups) % group.multiple == 0]
        wanted = amount(len(slices[0]), generator)
        if allowed and wanted:
            count = min(allowed, key=lambda n: abs(n - wanted))
            chosen = [own[torch.randperm(len(own), generator=generator)[:count]] for own in slices]
            pruned[position] = torch.cat(chosen).sort().values
    return pruned


def half(neurons: int, generator: torch.Generator) -> int:
    """Of a slice, rounded up."""
    return math.ceil(neurons / 2)


def uneven(neurons: int, generator: torch.Generator) -> int:
    """Another number of each group, none of some: what is the same for all of them by chance shows."""
    return int(torch.randint(neurons, (), generator=generator))


def one(neurons: int, generator: torch.Generator) -> int:
    """Of a slice."""
    return 1


AMOUNTS: dict[str, Amount] = {"half": half, "uneven": uneven, "one": one}


def cut_and_masked(network: Network, coupling: Coupling, amount: Amount) -> Record:
    """How far the network cut is from the network masked, as a share of what masking changes; suspects if it is far."""
    found: Record = {}
    pruned = part_of_each(coupling.groups, amount)
    found["neurons"] = sum(map(len, pruned.values()))
    for dtype in (torch.float32, torch.float64):
        found[str(dtype)[len("torch.") :]] = _difference(network, coupling, pruned, dtype)
    worst = outcome(found)
    if not agree(worst):
        found["suspects"] = list(_suspects(network, coupling, pruned))
    return found


def outcome(found: Record) -> Record:
    """What counts of `cut_and_masked`: float64 where the network runs in it."""
    return found["float64" if "share" in found["float64"] else "float32"]


def _suspects(network: Network, coupling: Coupling, pruned: Pruned) -> Iterator[str]:
    """Groups that differ when they are cut alone."""
    for position, neurons in pruned.items():
        alone = _difference(network, coupling, {position: neurons}, torch.float32)
        if not agree(alone):
            yield f"{coupling.groups[position].name}: {alone.get('error') or format(alone['share'], '.0e')}"


def _difference(network: Network, coupling: Coupling, pruned: Pruned, dtype: torch.dtype) -> Record:
    """The three networks compared on the same inputs."""
    try:
        model, inputs = _prepared(network, dtype)
        full = _output(model, inputs)
    except Exception as error:  # a dtype that the code checks
        return {"error": brief(error)}
    masked_model = copy.deepcopy(model)
    open_gaps(masked_model, coupling.groups, pruned)
    with Gaps():
        masked = _output(masked_model, inputs)
    try:
        cut_model, cut_coupling = copy.deepcopy((model, coupling))
        plan(cut_model, cut_coupling, pruned).commit()
        cut = _output(cut_model, inputs)
    except Exception as error:  # whatever it is, it is the outcome
        return {"error": f"cut: {brief(error)}"}
    if masked.isnan().any():
        return {"error": "the oracle leaves gaps in the output"}
    if cut.shape != full.shape:
        return {"error": f"the output has shape {tuple(cut.shape)} after the cut, {tuple(full.shape)} before"}
    effect, off = float((masked - full).abs().max()), float((cut - masked).abs().max())
    number = torch.finfo(full.dtype)
    units = off / (number.eps * float(full.abs().max()) + number.tiny)
    return {"share": off / max(effect, number.tiny), "effect": effect, "units": units}


def agree(outcome: Record) -> bool:
    """Whether what `_difference` found is rounding, measured by the effect or by the outputs themselves."""
    return "share" in outcome and (outcome["share"] <= ALLOWED or outcome["units"] <= ROUNDING)


def _prepared(network: Network, dtype: torch.dtype) -> tuple[nn.Module, Inputs]:
    """A copy of the model in evaluation mode, behind whose tensors nothing can hide, and inputs it has not seen."""
    model = copy.deepcopy(network.one_tensor()).eval()
    torch.manual_seed(1)
    vary_constants(model)
    inputs = tree_map(
        lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, network.inputs(3)
    )
    return model.to(dtype), inputs


@torch.no_grad()
def vary_constants(model: nn.Module) -> None:
    """Parameters and running statistics that are one number everywhere get another number in each entry."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        running = name.rpartition(".")[2] in ("running_mean", "running_var")
        if not (running or isinstance(tensor, nn.Parameter)) or tensor.numel() == 0:
            continue
        value = float(tensor.flatten()[0])
        if bool((tensor == value).all()):
            tensor.copy_(
                torch.empty_like(tensor).uniform_(0.7, 1.3) * value if value else 0.3 * torch.randn_like(tensor)
            )


def _output(model: nn.Module, inputs: Inputs) -> Tensor:
    torch.manual_seed(2)
    with plainly():
        return call(model, inputs)


# training


def train(network: Network, criterion: str) -> Record:
    """Ten steps of training, pruned to half the parameters on the way."""
    record: Record = {}
    network = by_position(network)
    model = network.one_tensor().train()
    torch.manual_seed(3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    curvature = flatprune.Curvature(model, loss=network.loss, factor_update_steps=2)
    with timed(record), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = flatprune.Pruner(
            model,
            optimizer,
            curvature,
            network.inputs(2),
            target=flatprune.Target(params=0.5),
            total_steps=STEPS,
            criterion=criterion,
        )
        record["groups"] = len(pruner.groups)
    training: Record = {}
    with timed(training), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = _loss(network, call(model, network.inputs(BATCH)))
            loss.backward()
            optimizer.step()
            pruner.step()
    record["training"] = training
    record["left"] = pruner.params / pruner.params_start
    with torch.no_grad():
        after = call(model.eval(), network.inputs(2))
    if not (loss.isfinite() and after.isfinite().all()):
        record["error"] = "the loss or the output is not finite at the end"
    return record


def _loss(network: Network, output: Tensor) -> Tensor:
    if network.loss == "mse":
        return F.mse_loss(output, torch.randn_like(output))
    return F.cross_entropy(output, torch.randint(output.shape[1], (len(output), *output.shape[2:])))


def brief(error: BaseException) -> str:
    """An exception in a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
