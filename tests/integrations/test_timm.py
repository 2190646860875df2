"""timm's own objects in the order of its train.py: mixup, losses, scaler, average, scheduler, optimizers; files."""

import pytest
import torch
from torch import nn

import flatprune
from tests.conftest import prepare_for, thorough
from tests.pruning.optimizer_runs import Trained, net

prepare_for("timm")

import timm
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3, NativeScaler

pytestmark = pytest.mark.filterwarnings("ignore")
CLASSES, BATCH, STEPS, EPOCHS = 4, 8, 6, 2
SIZES = {"test_vit": {"img_size": 32}}


def network(name):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=CLASSES, **SIZES.get(name, {})).train()


def batches(epoch):
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(STEPS):
        labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        yield torch.randn(BATCH, 3, 32, 32, generator=generator) + labels.view(-1, 1, 1, 1), labels


class Script:
    """What train.py makes, and its loop, with the lines that prune."""

    def __init__(self, name, opt="adamw", loss=None, mixup=False, parts=1, make_ema=ModelEmaV3, curvature=None):
        self.model, self.parts = network(name), parts
        self.optimizer = create_optimizer_v2(self.model, opt=opt, lr=1e-3, weight_decay=0.01)
        self.average = make_ema(self.model, decay=0.9)
        self.mixup = Mixup(num_classes=CLASSES, cutmix_alpha=1.0) if mixup else None
        self.task = ClassificationTask(self.model, loss or nn.CrossEntropyLoss(), verbose=False)
        self.scaler = NativeScaler(device="cpu")
        per_epoch = STEPS // parts
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, num_epochs=EPOCHS, warmup_epochs=1, step_on_epochs=False, updates_per_epoch=per_epoch
        )
        self.pruning = flatprune.PruneWhileTraining(
            self.model,
            self.optimizer,
            torch.randn(2, 3, 32, 32),
            target=0.5,
            total_steps=EPOCHS * per_epoch,
            accumulate=parts,
            ema_models=[self.average],
            schedule=flatprune.CubicSchedule(EPOCHS * per_epoch, 0.2, 0.8, every=2),
            flatness={"every": 2},
            curvature=curvature,
        )

    def train(self):
        updates = 0
        for epoch in range(EPOCHS):
            for index, (images, target) in enumerate(batches(epoch)):
                if self.mixup is not None:
                    images, target = self.mixup(images, target)
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    result = self.task(images, target)
                    loss = self.pruning.loss(images, result["output"], result["loss"]) / self.parts
                due = (index + 1) % self.parts == 0
                self.scaler(loss, self.optimizer, clip_grad=1.0, parameters=self.model.parameters(), need_update=due)
                if due:
                    updates += 1
                    self.optimizer.zero_grad()
                    self.average.update(self.model, updates)
                    self.pruning.step()
                    self.scheduler.step_update(updates)
        return self


CASES = {
    "mixup": ("test_resnet", {"opt": "sgd", "loss": SoftTargetCrossEntropy(), "mixup": True}),
    "smoothing": ("test_vit", {"opt": "lamb", "loss": LabelSmoothingCrossEntropy(0.1), "parts": 2}),
    "bce": ("test_convnext", {"loss": BinaryCrossEntropy(), "mixup": True, "curvature": {"loss": "bce"}}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_sequence_of_train_py(case):
    name, options = CASES[case]
    script = Script(name, **options).train()
    pruner, model, average = script.pruning.pruner, script.model, script.average
    assert script.pruning.finished and pruner.params <= 1.01 * 0.5 * pruner.params_start
    assert script.pruning.flatness.floors is not None  # its warm-up is over
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    before = {key: tensor.clone() for key, tensor in average.module.state_dict().items()}
    average.update(model, 100)
    for key, tensor in model.state_dict().items():
        found = average.module.state_dict()[key]
        assert found.shape == tensor.shape
        if found.is_floating_point():
            torch.testing.assert_close(found, before[key].lerp(tensor, 0.1), msg=key)
    x = torch.randn(2, 3, 32, 32)
    assert average.module(x).shape == (2, CLASSES)


def test_averages_of_each_kind():
    def in_double(model, decay):
        return ModelEmaV3(model, decay=decay, dtype=torch.float64, exclude_buffers=True)

    def second(model, decay):
        average = ModelEmaV2(model, decay)
        update = average.update
        average.update = lambda model, _step: update(model)
        return average

    for make in (in_double, second):
        script = Script("test_resnet", make_ema=make).train()
        shapes = [tensor.shape for tensor in script.model.state_dict().values()]
        assert [tensor.shape for tensor in script.average.module.state_dict().values()] == shapes
    with pytest.raises(TypeError, match=r"ema_models\[0\] is ModelEma, expected a torch\.nn\.Module: give its \.ema"):
        Script("test_resnet", make_ema=ModelEma)


def test_what_is_saved_loads(tmp_path):
    script = Script("test_resnet").train()
    flatprune.save(script.average.module, tmp_path / "small.pt")
    loaded = flatprune.load(tmp_path / "small.pt", into=network("test_resnet"))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), script.average.module.eval()(x))


# those left out: Adafactors that judge by a weight's sizes which states it has, and one that differentiates twice
LEFT_OUT = ["bnb*", "fused*", "*adafactor*", "adahessian"]
NAMES = sorted({*list_optimizers(exclude_filters=LEFT_OUT), "lookahead_radam"})


@pytest.mark.parametrize("name", thorough(NAMES, but=["lookahead_radam", "muon", "lamb", "kron"]))
def test_optimizers_are_cut_or_refused_by_name(name):
    model = net()
    trained = Trained(model, create_optimizer_v2(model, opt=name, lr=1e-3))
    if name.startswith("kron"):  # a preconditioner for each dimension
        with pytest.raises(ValueError, match="of Kron"):
            trained.train()
    else:
        trained.train().check()
