"""Loggers: TensorBoard's files read back, wandb and mlflow by stubs that have the signatures of their real calls."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import flatprune
from flatprune.errors import InputError, MissingPackageError
from flatprune.integrations.loggers import LOGGERS, MLflowLogger, TensorBoardLogger, WandbLogger, check_logger
from tests.integrations.tensorboard_files import scalars_in
from tests.pruning.pruning_networks import chain, digits, sgd

STEPS = 20


class Kept:
    """A logger that keeps what it is told."""

    def __init__(self):
        self.told = []

    def log(self, step, scalars):
        self.told.append((step, scalars))


def trained(logger):
    torch.manual_seed(0)
    model, (x, y) = chain().train(), digits()
    optimizer = sgd(model)
    pruning = flatprune.PruneWhileTraining(model, optimizer, x[:2], target=0.4, total_steps=STEPS, logger=logger)
    for step in range(STEPS):
        rows = slice(32 * step, 32 * step + 32)
        outputs = model(x[rows])
        optimizer.zero_grad()
        pruning.loss(x[rows], outputs, F.cross_entropy(outputs, y[rows])).backward()
        optimizer.step()
        pruning.step()
    return model, pruning


def test_a_loop_tells_its_logger_of_each_event():
    kept = Kept()
    model, pruning = trained(kept)
    history = pruning.pruner.history
    (first, start), *events = kept.told
    assert first == 0 and start["size/params"] == sum(p.numel() for p in chain().parameters())
    assert "event/removed" not in start and start["size/params_fraction"] == 1.0
    assert [step for step, _ in events] == sorted({record.step for record in history})
    for step, scalars in events:
        records = [record for record in history if record.step == step]
        assert scalars["event/removed"] == sum(record.removed for record in records)
        by_round = {record.round: record for record in records}.values()
        for name in ("predicted_change", "measured_change"):
            assert scalars[f"event/{name}"] == pytest.approx(sum(getattr(record, name) for record in by_round))
        assert scalars["size/params"] == records[-1].params_after
    _, last = events[-1]
    assert last["size/macs"] == flatprune.models.multiply_accumulates(model, digits()[0][:1]) < start["size/macs"]
    widths = {name.removeprefix("width/"): value for name, value in last.items() if name.startswith("width/")}
    assert widths == pruning.pruner.widths() and sum(widths.values()) < sum(
        value for name, value in start.items() if name.startswith("width/")
    )


def test_being_told_changes_nothing():
    logged, pruning = trained(Kept())
    alone, other = trained(None)
    assert all(torch.equal(a, b) for a, b in zip(logged.parameters(), alone.parameters(), strict=True))
    told = pruning.scalars()["curvature/spectral_radius"]
    assert pruning.curvature.spectral_radius() == other.curvature.spectral_radius()
    factors = pruning.curvature.factors
    largest = {key: float(torch.linalg.eigvalsh(factors[key].double()).max()) for key in factors}
    exact = max(largest[f"{name}.A"] * largest[f"{name}.G"] for name in pruning.curvature.layers)
    assert told == pytest.approx(exact, rel=1e-2)


def test_tensorboard_shows_what_it_was_told(tmp_path):
    pytest.importorskip("tensorboard")
    logger = TensorBoardLogger(tmp_path)
    for step in (1, 2, 3):
        logger.log(step, {"size/params": 10.0 / step, "width/0": 4.0})
    logger.close()
    assert scalars_in(tmp_path) == {
        "size/params": [(1, 10.0), (2, 5.0), (3, pytest.approx(10 / 3))],
        "width/0": [(1, 4.0), (2, 4.0), (3, 4.0)],
    }
    again = TensorBoardLogger(tmp_path, purge_step=2)
    again.log(2, {"size/params": 7.0})
    again.close()
    assert scalars_in(tmp_path)["size/params"] == [(1, 10.0), (2, 7.0)]


class WandbRun:
    def __init__(self, told):
        self._told = told

    def log(self, data, step=None, commit=None):
        self._told.append((step, data))

    def finish(self, exit_code=None):
        self._told.append("finish")


def wandb_stub(told):
    """The calls of wandb 0.31 that are made, with its signatures; its own run needs a service."""
    stub = ModuleType("wandb")
    stub.run = None

    def init(entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None, config=None, group=None):
        told.append({"project": project, "dir": dir, "name": name, "config": config, "group": group})
        return WandbRun(told)

    stub.init = init
    return stub


def test_wandb_begins_and_ends_its_own_run(monkeypatch, tmp_path):
    told = []
    monkeypatch.setitem(sys.modules, "wandb", wandb_stub(told))
    logger = LOGGERS["wandb"](tmp_path / "mine", "pruned", {"epochs": 2}, 0)
    logger.log(3, {"size/params": 5.0})
    logger.close()
    begun = {"project": "flatprune", "group": "mine", "name": "mine/pruned", "config": {"epochs": 2}}
    assert told == [{**begun, "dir": tmp_path / "mine"}, (3, {"size/params": 5.0}), "finish"]


def test_wandb_leaves_a_run_of_the_user_open(monkeypatch):
    told = []
    monkeypatch.setitem(sys.modules, "wandb", stub := wandb_stub(told))
    stub.run = WandbRun(told)
    logger = WandbLogger(project="unused")
    logger.log(3, {"size/params": 5.0})
    logger.close()
    assert told == [(3, {"size/params": 5.0})]


def mlflow_stub(told, active=None):
    """The calls of mlflow 3.17 that are made, with its signatures."""
    stub = ModuleType("mlflow")

    def start_run(run_id=None, experiment_id=None, run_name=None, nested=False, tags=None):
        told.append(run_name)
        return SimpleNamespace(info=SimpleNamespace(run_id="own"))

    def log_metrics(metrics, step=None, synchronous=None, run_id=None, timestamp=None):
        told.append((run_id, step, metrics))

    def log_params(params, synchronous=None, run_id=None):
        told.append(params)

    stub.active_run = lambda: active
    stub.end_run = lambda status="FINISHED": told.append(status)
    stub.start_run, stub.log_metrics, stub.log_params = start_run, log_metrics, log_params
    return stub


def test_mlflow_begins_and_ends_its_own_run(monkeypatch, tmp_path):
    told = []
    monkeypatch.setitem(sys.modules, "mlflow", mlflow_stub(told))
    logger = LOGGERS["mlflow"](tmp_path / "mine", "dense", {"epochs": 2}, 0)
    logger.log(3, {"size/params": 5.0})
    logger.close()
    assert told == ["mine/dense", {"epochs": 2}, ("own", 3, {"size/params": 5.0}), "FINISHED"]


def test_mlflow_leaves_a_run_of_the_user_open(monkeypatch):
    told = []
    active = SimpleNamespace(info=SimpleNamespace(run_id="theirs"))
    monkeypatch.setitem(sys.modules, "mlflow", mlflow_stub(told, active))
    logger = MLflowLogger({"unused": 1}, run_name="unused")
    logger.log(3, {"size/params": 5.0})
    logger.close()
    assert told == [("theirs", 3, {"size/params": 5.0})]


@pytest.mark.parametrize(
    ("kind", "package"), [(TensorBoardLogger, "tensorboard"), (WandbLogger, "wandb"), (MLflowLogger, "mlflow")]
)
def test_what_is_missing_is_said_with_its_install_line(monkeypatch, tmp_path, kind, package):
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf"pip install 'kfac-ext\[{package}\]'"):
        kind(**({"folder": tmp_path} if kind is TensorBoardLogger else {}))
    with pytest.raises(MissingPackageError, match=f"--logger {package} needs {package}"):
        check_logger(package)


def test_an_unknown_logger_is_answered():
    with pytest.raises(InputError, match="logger is 'tensorbord', did you mean tensorboard"):
        check_logger("tensorbord")
