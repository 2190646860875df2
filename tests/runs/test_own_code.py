"""A run of the user's own network and data: it resumes, is tested, exported and checked; no file runs its code."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import flatprune as package
from flatprune import named, runs
from flatprune.errors import InputError, Interrupted
from flatprune.export import export_run
from flatprune.files.finished import HISTORY_FILE, read_history
from flatprune.reporting import report
from flatprune.runs.folder import WHOLE, check_run
from flatprune.settings import Settings
from tests.training.acting import At

SOURCE = """
import numpy as np
from torch import nn

class Net(nn.Module):
    def __init__(self, features, classes):
        super().__init__()
        self.width = 12
        self.first = nn.Linear(features, 12)
        self.last = nn.Linear(12, classes)

    def forward(self, x):
        return self.last(self.first(x.flatten(1)).relu().view(-1, self.width))

def net(image_shape, classes):
    return Net(int(np.prod(image_shape)), classes)

def images():
    draw = np.random.default_rng(0)
    y = draw.integers(0, 3, 80)
    x = draw.normal(size=(80, 2, 2, 1)).astype(np.float32)
    x[:, 0, 0, 0] += 3 * y
    return x[:60], y[:60], x[60:], y[60:]

class AtEveryPixel(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.first = nn.Conv2d(1, 12, 1)
        self.last = nn.Conv2d(12, classes, 1)

    def forward(self, x):
        return self.last(self.first(x).relu())

def pixels(classes): return AtEveryPixel(classes)
def places():
    y = np.random.default_rng(0).integers(0, 3, (80, 4, 5))
    x = (y[..., None] - 1.0).astype(np.float32)
    return x[:60], y[:60], x[60:], y[60:]

def number(): return 3
def crossed(classes): return nn.Linear(4, classes)
def looped(image_shape, classes): return Loop(4, classes)

class Loop(nn.Module):
    def __init__(self, features, classes):
        super().__init__()
        self.last = nn.Linear(features, classes)

    def forward(self, x):
        return self.last(x.flatten(1))
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Names of functions in a module that no test has imported before."""
    module = f"own_{tmp_path.name}"
    (tmp_path / f"{module}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(named, "_allowed", set())
    monkeypatch.setattr(report, "write_report", lambda *_: None)
    yield lambda name: f"{module}:{name}"
    sys.modules.pop(module, None)


def settings_of(own, **changes):
    values = {"model": own("net"), "data": own("images"), "epochs": 4, "batch_size": 20, "target_params": 0.5}
    return Settings(**{**values, "flatness": "off", "threads": 1, **changes})


def test_a_prediction_at_every_place(own, tmp_path):
    pixels, places = {"model": own("pixels")}, {"data": own("places")}
    settings = settings_of(own, **pixels, **places, optimizer="adam", lr=0.05, epochs=20, flatness="on")
    summary = runs.run(settings, tmp_path / "out")
    network, data = package.load(tmp_path / "out"), settings.dataset()
    logits = network(data.x_test).double()
    right = (logits.argmax(1) == data.y_test).double().mean()
    of_label = logits.log_softmax(1).gather(1, data.y_test[:, None])
    assert summary["test_accuracy_last"] == pytest.approx(100.0 * float(right)) and float(right) > 0.9
    assert summary["test_nll"] == pytest.approx(-float(of_label.detach().mean()))
    assert summary["params_after"] < summary["params_before"] and 0.0 < summary["test_ece"] < 0.5
    last = [record for record in read_history(tmp_path / "out" / HISTORY_FILE) if record["kind"] == "epoch"][-1]
    assert 90.0 < last["train_accuracy"] <= 100.0
    for given, found in ((pixels, "(3, 2, 2)"), (places, "(3,)")):  # of images [2, 2], and of networks
        with pytest.raises(InputError) as raised:
            runs.run(settings_of(own, **given), tmp_path / "refused")
        assert found in str(raised.value) and "y_train has shape (60" in str(raised.value)


def press_ctrl_c():
    raise Interrupted("asked to stop")


def test_a_run_from_beginning_to_end(own, tmp_path, flatprune):
    settings = settings_of(own)
    runs.run(settings, tmp_path / "whole")
    with pytest.raises(Interrupted, match=f"--resume --out .* --model {own('net')} --data {own('images')}"):
        runs.run(settings, tmp_path / "out", observer=lambda _: At(8, press_ctrl_c))
    named._allowed.clear()  # another process
    with pytest.raises(InputError, match="a file names it, which runs no code unless you do: say --"):
        runs.resume(tmp_path / "out")
    summary = runs.resume(tmp_path / "out", {"model": own("net"), "data": own("images")})
    whole = json.loads((tmp_path / "whole/summary.json").read_text())
    assert summary["params_after"] == whole["params_after"] < whole["params_before"]
    assert summary["test_accuracy_last"] == whole["test_accuracy_last"] > 50.0

    named._allowed.clear()
    assert all(state == WHOLE for state in check_run(tmp_path / "out").values())
    with pytest.raises(InputError, match=f"say --model {own('net')}"):
        package.load(tmp_path / "out")
    module = sys.modules[own("net").partition(":")[0]]
    network = package.load(tmp_path / "out", into=module.net((1, 2, 2), 3))
    assert network.width == network.first.out_features < 12
    assert torch.equal(network.normalization(module.images()[0])[0], network.normalization(module.images()[0][:1])[0])
    outcome = flatprune("eval", tmp_path / "out", "--model", own("net"), "--data", own("images"))
    assert outcome.code == 0 and f"test accuracy {summary['test_accuracy_last']!r} %" in outcome.out
    assert export_run(tmp_path / "out", "torch").files[-1].name == "network.py"
    with pytest.raises(InputError, match="class of your own"):
        export_run(tmp_path / "out", "safetensors")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("number", "gives int, expected a torch.nn.Module"),
        ("crossed", "raises RuntimeError for images 1x2x2"),
        ("images", "gives tuple"),
        ("looped", "can be pruned"),
        ("nets", "has no function nets; did you mean net"),
    ],
)
def test_networks_that_cannot_be_used(own, tmp_path, name, message):
    with pytest.raises(InputError, match=message):
        runs.run(settings_of(own, model=own(name)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_function_is_called_with(own, tmp_path):
    with pytest.raises(InputError, match="no module nowhere_at_all here"):
        runs.run(settings_of(own, model="nowhere_at_all:net"), tmp_path / "out")
    with pytest.raises(InputError, match="takes no widths"):
        runs.run(settings_of(own, widths=(3,)), tmp_path / "out")
    (tmp_path / "a_file:net").write_text("")
    assert not named.is_named("a_file:net") and named.is_named("a_module:net")
    assert not named.is_named("https://a/b") and not named.is_named("resnet20")
