from __future__ import annotations

import pytest

from flatprune.pruning.schedule import CubicSchedule
from flatprune.pruning.targets import Target


def test_events_end_at_the_end_and_keep_their_distance():
    schedule = CubicSchedule(1000)
    assert schedule.events[-1] == 400
    assert schedule.events[0] > 100
    assert all(b - a == 20 for a, b in zip(schedule.events, schedule.events[1:]))
    assert len(schedule.events) == 15


def test_budget_is_a_cubic_that_ends_at_the_target():
    schedule = CubicSchedule(1000)
    budgets = [schedule.budget(step, 10_000, 1_000) for step in schedule.events]
    assert budgets[-1] == 1_000
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[4] == 1_000 + int(9_000 * (1 - 5 / 15) ** 3)
    assert schedule.budget(399, 10_000, 1_000) is None
    assert [step for step in range(1, 1001) if schedule.budget(step, 9, 1) is not None] == list(schedule.events)


@pytest.mark.parametrize(("total", "events"), [(1_000, 15), (2_000, 25), (3_000, 25), (10_000, 25), (80_000, 25)])
def test_long_trainings_have_no_more_than_25_events(total, events):
    schedule = CubicSchedule(total)
    assert len(schedule.events) == events
    assert schedule.events[-1] == 0.4 * total and schedule.events[0] > 0.1 * total
    assert len(CubicSchedule(total, every=20).events) == 0.3 * total / 20


@pytest.mark.parametrize("total", [1, 2, 10, 50])
def test_short_trainings_have_one_event(total):
    schedule = CubicSchedule(total)
    assert len(schedule.events) == 1
    assert 1 <= schedule.events[0] <= total
    assert schedule.is_last(schedule.events[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": 0}, "total_steps is 0"),
        ({"total_steps": 10, "start": 0.5, "end": 0.4}, "start 0.5 and end 0.4"),
        ({"total_steps": 10, "end": 1.5}, "end 1.5"),
        ({"total_steps": 10, "every": 0}, "every is 0"),
    ],
)
def test_bad_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CubicSchedule(**arguments)


@pytest.mark.parametrize("params", [0, 0.0, -0.1, 1.01, float("nan"), "0.1", True])
def test_bad_targets_are_refused(params):
    with pytest.raises(ValueError, match=r"params is .*, expected a number above 0 and at most 1"):
        Target(params=params)


def test_target_in_parameters():
    assert Target(0.1).goal(266_610) == 26_661
    assert Target(1).goal(7) == 7
