"""Two made-up methods on scikit-learn's digits."""

import pytest

from bench.rivals import method, tasks
from bench.rivals.method import Knob, Method


class Halver(Method):
    title = "halver"
    source = "nobody"
    knob = Knob("strength", 1.0, (2.0, 3.0))

    def loss(self, run, x, outputs, loss):
        assert run.model.training and len(x) == len(outputs) == 32
        return loss

    def after_step(self, run):
        run.model.eval()  # as libraries do that trace networks
        if run.step == 2:
            run.model[1].weight.data.mul_(float("nan") if self.value == 3.0 else 1.0)


class Absent(Method):
    title = "absent"
    source = "nobody"
    package, distribution = "no_such_package", "no-such-package"


@pytest.fixture
def study(monkeypatch):
    """The methods "ours" (a plain one) and "absent", the task "tiny" with one size."""
    known = {"ours": Halver, "absent": Absent}
    for place in ("bench.rivals.method", "bench.rivals.plan", "bench.rivals.one_run"):
        monkeypatch.setattr(f"{place}.all_methods", lambda: known)
    tiny = tasks.Task("tiny", "digits", 8, "mlp", (8,), train_size=128, epochs=2, batch_size=32)
    monkeypatch.setitem(tasks.TASKS, "tiny", tiny)
    assert method.all_methods() is known
    return known
