"""Lightning's Trainer with the pruning callback: targets, precision, accumulation, checkpoints that go on and load."""

import csv
from collections import Counter
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import flatprune
from flatprune.errors import InputError

if find_spec("lightning") is None:
    pytest.skip("lightning is not installed", allow_module_level=True)

import lightning

from flatprune.integrations.lightning import PruningCallback, load_pruned

pytestmark = pytest.mark.filterwarnings("ignore")
EPOCHS, BATCHES = 2, 10


class Classifier(lightning.LightningModule):
    """A conv net of four classes."""

    def __init__(self, manual=False):
        super().__init__()
        self.automatic_optimization = not manual
        layers = [nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(8, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)]
        self.model = nn.Sequential(*layers)

    def training_step(self, batch, _index):
        x, y = batch
        loss = F.cross_entropy(self.model(x).float(), y)
        if not self.automatic_optimization:
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def batches():
    y = torch.arange(8 * BATCHES) % 4
    x = torch.randn(len(y), 1, 8, 8, generator=torch.Generator().manual_seed(0)) + y.view(-1, 1, 1, 1)
    return DataLoader(TensorDataset(x, y), 8)


def trained(folder, manual=False, ckpt_path=None, epochs=EPOCHS, **options):
    torch.manual_seed(0)
    module = Classifier(manual)
    steps = EPOCHS * BATCHES // options.get("accumulate_grad_batches", 1)
    made = {"schedule": flatprune.CubicSchedule(steps, 0.3, 0.7, every=2)}
    callback = PruningCallback(0.4, pruning={**made, "curvature": {"generator": torch.Generator().manual_seed(0)}})
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[callback],
        default_root_dir=folder,
        enable_checkpointing=False,
        **quiet,
        **{"logger": False, **options},
    )
    trainer.fit(module, batches(), ckpt_path=ckpt_path)
    return module, callback, trainer


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}, {"manual": True}])
def test_the_target_is_reached(tmp_path, options):
    before = sum(p.numel() for p in Classifier().parameters())
    module, callback, trainer = trained(tmp_path, **options)
    assert sum(p.numel() for p in module.parameters()) <= 1.01 * 0.4 * before
    assert callback.pruning.finished and callback.pruning.pruner.step_count == trainer.global_step
    assert callback.pruning.flatness.floors is not None
    assert not module.model._forward_hooks


def test_its_loggers_are_told(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    _, callback, trainer = trained(tmp_path, logger=CSVLogger(tmp_path, flush_logs_every_n_steps=1))
    with open(f"{trainer.logger.log_dir}/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    events = {int(row["step"]): row for row in rows if row["event/removed"]}
    removed = Counter()
    for record in callback.pruning.pruner.history:
        removed[record.step] += record.removed
    assert {step: float(row["event/removed"]) for step, row in events.items()} == removed and len(removed) > 1
    now = callback.pruning.scalars()
    assert {name: float(trainer.callback_metrics[name]) for name in now} == pytest.approx(now)
    assert {name: float(rows[-1][name]) for name in now} == pytest.approx(now)


def test_a_checkpoint_goes_on_and_loads(tmp_path):
    module, callback, trainer = trained(tmp_path, epochs=1)
    widths = callback.pruning.pruner.widths()
    assert sum(p.numel() for p in module.parameters()) < sum(p.numel() for p in Classifier().parameters())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    loaded = load_pruned(Classifier(), tmp_path / "half.ckpt")
    x = batches().dataset.tensors[0][:4]
    with torch.no_grad():
        assert torch.equal(loaded.model(x), module.eval().model(x))
    further, again, _ = trained(tmp_path, ckpt_path=tmp_path / "half.ckpt")
    assert again.pruning.finished and again.pruning.pruner.step_count == EPOCHS * BATCHES
    assert all(again.pruning.pruner.widths()[name] <= width for name, width in widths.items())
    assert [r.step for r in again.pruning.pruner.history][: len(callback.pruning.pruner.history)] == [
        r.step for r in callback.pruning.pruner.history
    ]
    assert further.model[0].weight.shape[0] == again.pruning.pruner.widths()["0"]


def test_what_cannot_be_meant_is_refused(tmp_path):
    class Two(Classifier):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(2, 2)

    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, callbacks=[PruningCallback(0.5)], default_root_dir=tmp_path
    )
    with pytest.raises(InputError, match="name the network"):
        trainer.fit(Two(), batches())
    with pytest.raises(InputError, match="PruningCallback: nothing is pruned before training has begun"):
        trainer.callbacks[0].pruning  # noqa: B018
    torch.save({"callbacks": {}}, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match="no PruningCallback"):
        load_pruned(Classifier(), tmp_path / "other.ckpt")
