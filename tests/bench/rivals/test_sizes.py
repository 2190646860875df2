"""Knobs found by bisection, and what networks weigh."""

import torch
from torch import nn

from bench.rivals.sizes import Goal, bisected


def network(width):
    return nn.Sequential(nn.Linear(10, width), nn.ReLU(), nn.Linear(width, 4))


def test_the_ratio_that_lands_closest():
    """Channels are whole: the cost falls in steps, and the best ratio is on the step next to the target."""
    goal = Goal("params", 0.3, torch.zeros(2, 10))
    target = 0.3 * goal.cost(network(100))

    def cost(ratio):
        return goal.cost(network(max(1, round(100 * (1 - ratio)))))

    found = cost(bisected(cost, 0.0, 1.0, target))
    assert found == min((cost(n / 100) for n in range(101)), key=lambda c: abs(c - target))


def test_whole_knobs_and_ends():
    calls = []

    def cost(n):
        calls.append(n)
        return 100 - n

    assert bisected(cost, 0, 100, 37) == 63 and len(calls) <= 9
    assert bisected(cost, 0, 100, -5) == 100 and bisected(cost, 0, 100, 500) == 0


def test_a_cost_that_jumps_over_the_target():
    assert bisected(lambda n: 100 if n < 7 else 10, 0, 20, 60) < 7
    assert bisected(lambda n: 100 if n < 7 else 10, 0, 20, 50) >= 7


def test_units():
    example = torch.zeros(2, 10)
    assert Goal("params", 1.0, example).cost(network(5)) == 55 + 24
    assert Goal("macs", 1.0, example).cost(network(5)) == 50 + 20
