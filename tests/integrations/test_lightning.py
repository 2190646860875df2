"""Lightning's Trainer with the pruning callback: targets, precision, accumulation, checkpoints that go on and load."""

import csv
from collections import Counter
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel
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


def trained(
    folder,
    manual=False,
    ckpt_path=None,
    epochs=EPOCHS,
    build=Classifier,
    callbacks=(),
    data=batches,
    told=(),
    **options,
):
    torch.manual_seed(0)
    module = build(manual)
    steps = EPOCHS * BATCHES // options.get("accumulate_grad_batches", 1)
    made = {"schedule": flatprune.CubicSchedule(steps, 0.3, 0.7, every=2)}
    made["ema_models"] = [module.get_submodule(name) for name in told]
    made["curvature"] = {"generator": torch.Generator().manual_seed(0)}
    callback = PruningCallback(0.4, network="model" if told else None, pruning=made)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[callback, *callbacks],
        default_root_dir=folder,
        enable_checkpointing=False,
        **quiet,
        **{"logger": False, **options},
    )
    trainer.fit(module, data(), ckpt_path=ckpt_path)
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


class Averaged(Classifier):
    """Keeps an average of its own."""

    def __init__(self, manual=False):
        super().__init__(manual)
        self.average = AveragedModel(self.model)

    def on_train_batch_end(self, *_given):
        self.average.update_parameters(self.model)


def averages():
    from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

    return {
        "averaged": lambda: {"callbacks": [WeightAveraging()]},
        "swa": lambda: {"callbacks": [StochasticWeightAveraging(1e-3, swa_epoch_start=1)]},
        "own": lambda: {"build": Averaged, "told": ["average"]},
    }


@pytest.mark.parametrize("name", ["averaged", "swa", "own"])
def test_averages_are_cut_along_and_go_on(tmp_path, name):
    class Half(lightning.Callback):
        def on_train_epoch_end(self, trainer, _module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    options = averages()[name]
    module, callback, _ = trained(tmp_path, **{**options(), "callbacks": [*options().get("callbacks", ()), Half()]})
    assert callback.pruning.finished and len(callback.pruning.pruner.ema_models) == 1
    further, again, _ = trained(tmp_path, ckpt_path=tmp_path / "half.ckpt", **options())
    assert again.pruning.finished
    if name != "swa":  # which keeps no average in a checkpoint
        for (key, a), b in zip(module.state_dict().items(), further.state_dict().values(), strict=True):
            assert torch.equal(a, b), key
    load_pruned(options().get("build", Classifier)(), tmp_path / "half.ckpt", network="model")


class Graphs(Classifier):
    """Nodes and edges, of which the first samples are no graph."""

    def __init__(self, manual=False):
        super().__init__(manual)

        class Network(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 4)

            def forward(self, nodes, edges):
                hidden = self.first(nodes).relu()
                return self.last(hidden.index_add(0, edges[1], hidden[edges[0]]))

        self.model = Network()

    def training_step(self, batch, _index):
        nodes, edges, labels = batch
        return F.cross_entropy(self.model(nodes, edges), labels)


def graphs():
    generator = torch.Generator().manual_seed(0)
    made = [(torch.randn(12, 6, generator=generator), torch.randint(0, 12, (2, 30), generator=generator))]
    return DataLoader([(*made[0], torch.arange(12) % 4)] * BATCHES, batch_size=None)


def test_a_graph_stays_whole(tmp_path):
    _, callback, _ = trained(tmp_path, build=Graphs, data=graphs)
    pruner = callback.pruning.pruner
    assert pruner.params <= 1.01 * 0.4 * pruner.params_start


def test_a_network_that_nothing_calls_is_refused(tmp_path):
    class Bypassed(Classifier):
        def training_step(self, batch, _index):
            return F.cross_entropy(self.model.forward(batch[0]), batch[1])

    with pytest.raises(InputError, match="the network is trained, but not by a call of the module itself"):
        trained(tmp_path, build=Bypassed)


def test_what_cannot_be_meant_is_refused(tmp_path):
    several = SimpleNamespace(strategy=None, world_size=2)
    with pytest.raises(InputError, match="each of 2 processes"):
        PruningCallback(0.5).setup(several, Classifier(), "fit")

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
