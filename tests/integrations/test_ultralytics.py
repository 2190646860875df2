"""Ultralytics' own loop with pruning in it: sizes, files that load and predict, the average, going on, refusals."""

from types import SimpleNamespace

import pytest
import torch

import flatprune
from flatprune.errors import InputError
from tests.conftest import prepare_for
from tests.examples.loading import example

prepare_for("ultralytics")

from ultralytics import YOLO

from flatprune.integrations.ultralytics import pruning_trainer

pytestmark = pytest.mark.filterwarnings("ignore")
SIDE, EPOCHS, IMAGES, BATCH = 64, 3, 12, 4
TINY = """
nc: 2
reg_max: 4
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, C2f, [16, True]]
  - [-1, 1, Conv, [24, 3, 2]]
head:
  - [[3], 1, Detect, [nc]]
"""


@pytest.fixture(scope="module")
def drawn():
    """The example, which draws images."""
    module = example("ultralytics_yolo")
    module.install_font()
    return module


@pytest.fixture(scope="module")
def files(drawn, tmp_path_factory):
    """The images' description and the network's."""
    folder = tmp_path_factory.mktemp("yolo")
    (folder / "tiny.yaml").write_text(TINY)
    return drawn.write_data(folder / "data", train=IMAGES, val=4), folder / "tiny.yaml"


def trained(files, folder, model=None, target=0.5, pruning=None, callbacks=None, **options):
    torch.manual_seed(0)
    data, network = files
    yolo = YOLO(str(model or network), task="detect")
    for event, function in (callbacks or {}).items():
        yolo.add_callback(event, function)
    steps = EPOCHS * IMAGES // BATCH
    made = {"schedule": flatprune.CubicSchedule(steps, 0.1, 0.7, every=2), **(pruning or {})}
    settings = {"imgsz": SIDE, "batch": BATCH, "nbs": BATCH, "epochs": EPOCHS, "device": "cpu", "plots": False}
    settings |= {"project": str(folder), "name": "run", "exist_ok": True, "verbose": False}
    trainer = pruning_trainer(yolo, target, made)
    yolo.train(trainer=trainer, **{"data": str(data), "optimizer": "SGD", **settings, **options})
    return yolo


def size(model):
    return sum(p.numel() for p in model.parameters())


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    """A whole training, with the average beside the network at its end."""
    seen = {}

    def look(trainer):
        seen["pairs"] = list(zip(trainer.ema.ema.state_dict().values(), trainer.model.state_dict().values()))

    yolo = trained(files, tmp_path_factory.mktemp("run"), callbacks={"on_train_epoch_end": look})
    return yolo, seen


def test_it_shrinks_and_its_files_load_and_predict(files, run):
    yolo, _ = run
    pruner = yolo.trainer.pruning.pruner
    assert yolo.trainer.pruning.finished and pruner.step_count == EPOCHS * IMAGES // BATCH
    assert pruner.params <= 1.01 * 0.5 * pruner.params_start
    for path in (yolo.trainer.best, yolo.trainer.last):
        loaded = YOLO(str(path))
        assert size(loaded.model) == pruner.params
        assert not loaded.model._forward_pre_hooks
        assert len(loaded.predict(str(files[0].parent / "images/val"), imgsz=SIDE, verbose=False)) == 4
    rows = yolo.trainer.csv.read_text().splitlines()
    assert rows[0].split(",").index("size/params") > 0
    assert rows[-1].split(",")[rows[0].split(",").index("size/params")] == f"{pruner.params:.6g}"
    assert not yolo.trainer.model._forward_pre_hooks


def test_the_average_follows_after_the_cuts(run):
    yolo, seen = run
    averaged = [(ema, own) for ema, own in seen["pairs"] if ema.is_floating_point()]
    assert all(ema.shape == own.shape for ema, own in averaged)
    trainer = yolo.trainer
    before = [ema.clone() for ema, _ in averaged]
    trainer.ema.update(trainer.model)
    weight = 1 - trainer.ema.decay(trainer.ema.updates)
    for (ema, own), old in zip(averaged, before):
        torch.testing.assert_close(ema, old.lerp(own, weight))


@pytest.mark.parametrize("options", [{"optimizer": "MuSGD"}, {"optimizer": "AdamW", "nbs": 2 * BATCH, "freeze": 1}])
def test_optimizers_accumulation_and_frozen_layers(files, tmp_path, options):
    yolo = trained(files, tmp_path, pruning={"schedule": flatprune.CubicSchedule(4, 0.1, 0.7, every=1)}, **options)
    pruner = yolo.trainer.pruning.pruner
    assert yolo.trainer.pruning.finished and pruner.params <= 1.01 * 0.5 * pruner.params_start
    assert yolo.model.model[0].conv.weight.shape[0] == 8 or "freeze" not in options


def test_a_stopped_training_goes_on(files, tmp_path):
    class StoppedError(Exception):
        pass

    def stop(trainer):
        if trainer.epoch == 0:
            raise StoppedError

    with pytest.raises(StoppedError):
        trained(files, tmp_path, callbacks={"on_model_save": stop})
    last = tmp_path / "run/weights/last.pt"
    half = size(YOLO(str(last)).model)
    with pytest.raises(InputError, match=r"pruning\.pt: no such file"):
        (tmp_path / "run/weights/pruning.pt").rename(tmp_path / "kept.pt")
        trained(files, tmp_path, model=last, resume=True)
    (tmp_path / "kept.pt").rename(tmp_path / "run/weights/pruning.pt")
    yolo = trained(files, tmp_path, model=last, resume=True)
    pruner = yolo.trainer.pruning.pruner
    assert pruner.params_start > half > pruner.params == size(yolo.model)
    assert yolo.trainer.pruning.finished
    assert [r.step for r in pruner.history] == sorted(r.step for r in pruner.history) and pruner.history[0].step == 2


def test_a_pruned_network_trains_on_at_its_size(files, run, tmp_path, drawn):
    yolo, _ = run
    again = trained(files, tmp_path / "again", model=yolo.trainer.best, target=None, epochs=1)
    assert size(again.model) == size(yolo.model)
    with pytest.raises(InputError, match="nothing is pruned before training has begun, nor with target=None"):
        again.trainer.pruning  # noqa: B018
    assert not torch.equal(again.model.model[0].conv.weight, yolo.model.model[0].conv.weight)
    other = drawn.write_data(tmp_path / "other", train=4, val=4)
    other.write_text(other.read_text().replace("names: [", "names: ['line', "))
    with pytest.raises(InputError, match="the pruned network is of 2 classes, the data of 3"):
        trained((other, None), tmp_path / "other", model=yolo.trainer.best, epochs=1)


def test_a_loss_that_is_not_finite(files, tmp_path):
    def spoil(trainer):
        if trainer.epoch == spoilt and not trainer.nan_recovery_attempts:
            trainer.loss = trainer.loss * float("nan")

    spoilt = 1
    with pytest.raises(InputError, match=r"epoch 2 is not finite, and last\.pt is from before a removal"):
        trained(files, tmp_path, callbacks={"on_train_batch_end": spoil})
    spoilt = 2  # nothing goes any more
    early = {"schedule": flatprune.CubicSchedule(EPOCHS * IMAGES // BATCH, 0.1, 0.6, every=2)}
    yolo = trained(files, tmp_path, pruning=early, callbacks={"on_train_batch_end": spoil})
    assert yolo.trainer.pruning.pruner.step_count == EPOCHS * IMAGES // BATCH + IMAGES // BATCH
    assert not yolo.model._forward_pre_hooks


REFUSED = {
    "compile": ({"compile": True}, "compile=True: compiled code hides the layers"),
    "time": ({"time": 0.1}, "time=0.1: an end by the clock"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_had_is_refused_by_name(files, tmp_path, name):
    options, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        trained(files, tmp_path, **options)


def test_several_devices_and_flatness_are_refused(files, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="Flatness: the curvature's loss is 'other'"):
        trained(files, tmp_path, pruning={"flatness": True})
    yolo = YOLO(str(files[1]), task="detect")
    trainer = pruning_trainer(yolo, 0.5)
    base = trainer.__mro__[2]

    def with_two_devices(self, *_arguments, **_keywords):
        self.world_size, self.args = 2, SimpleNamespace(device="0,1")

    monkeypatch.setattr(base, "__init__", with_two_devices)
    with pytest.raises(InputError, match="device='0,1': Ultralytics starts a process for each of several devices"):
        trainer()
