"""Which layers of a network bear what: each group of neurons is cut alone, and what is left is evaluated."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flatprune.coupling import Coupling, find_coupling
from flatprune.coupling.example_inputs import example_calls
from flatprune.criteria import CRITERIA, Criterion, Scores, ScoringContext, as_criterion
from flatprune.cutting.surgery import plan
from flatprune.extras import needed_by
from flatprune.inspection.columns import aligned
from kfac_ext import Curvature
from kfac_ext.curvature.modes import undisturbed
from kfac_ext.curvature.recent import Call

_FRACTIONS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Sensitivity:
    """What a network is worth with a part of one group of neurons gone; `print` shows the table.

    Attributes:
        whole: what `evaluate` said of the network as it is.
        values: group -> fraction of its neurons gone -> what `evaluate` said of a copy without them.
        widths: group -> its neurons.
    """

    whole: float
    values: dict[str, dict[float, float]]
    widths: dict[str, int]

    def __str__(self) -> str:
        fractions = sorted({fraction for found in self.values.values() for fraction in found})
        rows = [("group", "neurons", *(f"-{fraction:.0%}" for fraction in fractions))]
        for name, found in self.values.items():
            cells = (f"{found[f]:.4g}" if f in found else "" for f in fractions)
            rows.append((name, str(self.widths[name]), *cells))
        return f"{aligned(rows)}\nas it is: {self.whole:.4g}"

    def plot(self, path: str) -> None:
        """Draw a line a group into a PNG file (needs matplotlib, of the extra `cli`)."""
        with needed_by("Sensitivity.plot"):
            from matplotlib.figure import Figure
        figure = Figure(figsize=(7, 4), layout="constrained")
        axis = figure.subplots()
        for name, found in self.values.items():
            axis.plot([0.0, *found], [self.whole, *found.values()], marker=".", label=name.replace("$", r"\$"))
        axis.set_xlabel("fraction of the group's neurons gone")
        axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
        figure.savefig(path)


def sensitivity(
    model: nn.Module,
    example_inputs: Any,
    evaluate: Callable[[nn.Module], float],
    *,
    fractions: Sequence[float] = _FRACTIONS,
    criterion: str | Criterion = "l2",
    curvature: Curvature | None = None,
    exclude: Sequence[str | type] = (),
) -> Sensitivity:
    """Which layers bear what: each group of neurons alone is cut by fractions in copies, and these are evaluated.

    Nothing is trained after a cut, nor do survivors compensate: what is lost at once is seen, layer against layer.

    Args:
        model: stays as it is.
        example_inputs: as for `flatprune.Pruner`.
        evaluate: says what a network is worth: its accuracy on held-out data, or its loss.
        fractions: of a group's neurons, each in (0, 1); what the group's slices do not allow is rounded down.
        criterion: the neurons of lowest score go: a name of `flatprune.criteria.CRITERIA`, or a `Criterion`.
        curvature: of the model, with factors, for criteria that read them.
        exclude: as for `flatprune.Pruner`.

    Raises:
        TypeError: `evaluate` is no function, or gives no number.
        ValueError: a fraction out of range; the criterion needs factors or gradients, and no curvature is given; it is
            another model's; no layer can be pruned.

    Example:
        >>> print(flatprune.sensitivity(model, x[:2], lambda network: accuracy(network, held_out)))
    """
    for fraction in fractions:
        if not 0.0 < fraction < 1.0:
            raise ValueError(f"sensitivity: a fraction is {fraction}, expected above 0 and below 1")
    if not callable(evaluate):
        raise TypeError(f"sensitivity: evaluate is {evaluate!r}, expected a function of the model")
    if curvature is not None and curvature.model is not model:
        raise ValueError("sensitivity: the curvature belongs to another model")
    judge = as_criterion(criterion)
    if curvature is None and judge.needs:
        free = ", ".join(name for name, other in CRITERIA.items() if not other.needs)
        needs = " and ".join(judge.needs)
        raise ValueError(
            f"sensitivity: criterion {judge.name!r} needs {needs}: give a curvature, or take one of {free}"
        )
    calls = example_calls(model, example_inputs)
    coupling = find_coupling(model, calls, exclude)
    if not coupling.groups:
        raise ValueError(f"sensitivity: no layer can be pruned: {'; '.join(map(str, coupling.refusals))}")
    scores = _scores(model, coupling, judge, curvature, calls[0])
    values: dict[str, dict[float, float]] = {group.name: {} for group in coupling.groups}
    with undisturbed(model):
        whole = _number(evaluate(model))
        for position, group in enumerate(coupling.groups):
            for fraction in sorted(fractions):
                cut = _without_lowest(model, coupling, position, scores[position], fraction)
                if cut is not None:
                    values[group.name][fraction] = _number(evaluate(cut))
    return Sensitivity(whole, values, {group.name: group.width for group in coupling.groups})


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"sensitivity: evaluate returned {type(value).__name__}, expected a number") from error


def _scores(model: nn.Module, coupling: Coupling, judge: Criterion, curvature: Curvature | None, call: Call) -> Scores:
    if curvature is not None:
        return judge.score(ScoringContext(model, coupling.groups, curvature))
    temporary = Curvature(model, loss="other", fisher_type="empirical")
    try:
        temporary.trace(*call.args, **call.kwargs)
        return judge.score(ScoringContext(model, coupling.groups, temporary))
    finally:
        temporary.remove()


def _without_lowest(
    model: nn.Module, coupling: Coupling, position: int, scores: Tensor, fraction: float
) -> nn.Module | None:
    """A copy without a fraction of one group's neurons, as many from each of its slices; None where none would go."""
    group = coupling.groups[position]
    count = int(fraction * group.width) // group.groups
    if count == 0:
        return None
    parts = [(group.group_of == part).nonzero().flatten() for part in range(group.groups)]
    lowest = torch.cat([part[scores.cpu()[part].argsort(stable=True)[:count]] for part in parts])
    network, own = copy.deepcopy(model), copy.deepcopy(coupling)
    plan(network, own, {position: lowest.sort().values}).commit()
    return network
