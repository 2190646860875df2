"""Cuts by Torch-Pruning (Fang et al. 2023, arXiv 2301.12900) to a goal, as its own scripts make them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from bench.rivals.training import Training

STEPS = 400  # small steps of a cut: `--iterative-steps` of its reproduce/main.py
MakePruner = Callable[
    [nn.Module, float, int], Any
]  # of a model, the ratio of channels that go, and the number of steps


def outputs_of(model: nn.Module, classes: int) -> list[nn.Module]:
    """The classifier, which its scripts leave as it is."""
    return [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == classes]


def maker(run: Training, pruner: str, importance: Any, **options: Any) -> MakePruner:
    """Makes pruners of a class of the library, which rank over all layers and leave the classifier.

    Args:
        run: whose example inputs and classes count.
        pruner: name of the class in `torch_pruning.pruner`.
        importance: its criterion.
        options: more of the class.
    """
    import torch_pruning as tp

    def make(model: nn.Module, ratio: float, steps: int) -> Any:
        return getattr(tp.pruner, pruner)(
            model,
            run.goal.example,
            importance=importance,
            global_pruning=True,
            pruning_ratio=ratio,
            iterative_steps=steps,
            ignored_layers=outputs_of(model, run.data.classes),
            **options,
        )

    return make


def cut_to_goal(run: Training, make: MakePruner) -> None:
    """Prune in small steps until the size is reached (`progressive_pruning` of its reproduce/main.py); a new optimizer.

    The authors stop at the first step beyond the size; here a copy tells whether that or the step before is closer.
    """
    with run.uncounted():
        costs = [run.goal.cost(run.model), *_costs(run, make)]
    count = min(range(len(costs)), key=lambda step: abs(costs[step] - run.target_cost))
    pruner = make(run.model, 1.0, STEPS)
    for _ in range(count):
        pruner.step()
    run.renew_optimizer()


def _costs(run: Training, make: MakePruner) -> Iterator[int]:
    model = copy.deepcopy(run.model)
    pruner = make(model, 1.0, STEPS)
    for _ in range(STEPS):
        pruner.step()
        cost = run.goal.cost(model)
        yield cost
        if cost <= run.target_cost:
            return


def cut_by(ratio: float, model: nn.Module, make: MakePruner) -> nn.Module:
    """Remove this fraction of the channels that are there, in one step."""
    make(model, ratio, 1).step()
    return model


def all_groups(model: nn.Module, run: Training) -> list[Any]:
    """The coupled groups of a network, each with all its channels."""
    import torch_pruning as tp

    graph = tp.DependencyGraph().build_dependency(model, example_inputs=run.goal.example)
    return list(graph.get_all_groups(outputs_of(model, run.data.classes), [nn.Conv2d, nn.Linear]))


def groups_of(model: nn.Module, run: Training, chosen: Sequence[list[int]]) -> list[Any]:
    """The same with only some channels each; groups without any are left out."""
    import torch_pruning as tp

    graph = tp.DependencyGraph().build_dependency(model, example_inputs=run.goal.example)
    roots = graph.get_all_groups(outputs_of(model, run.data.classes), [nn.Conv2d, nn.Linear])
    places = [(group[0].dep.target.module, group[0].dep.handler) for group in roots]
    return [graph.get_pruning_group(*place, channels) for place, channels in zip(places, chosen) if channels]


def pruned_axis(dependency: Any) -> int | None:
    """The axis of the weight of a dependency's layer that its channels go from; None for what has no weight."""
    if not isinstance(dependency.target.module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
        return None
    inputs = dependency.handler.__name__ == "prune_in_channels"
    return int(inputs and not isinstance(dependency.target.module, nn.BatchNorm2d))
