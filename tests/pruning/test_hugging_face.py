"""Networks of transformers as they come: no wrapper, keywords, outputs of many parts, labels of -100, resumed."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F

import flatprune
from bench.zoo import transformers_signals, transformers_text, transformers_vision
from flatprune.pruning.schedule import CubicSchedule
from tests.conftest import prepare_for, thorough

BUILDERS = {**transformers_text.NETWORKS, **transformers_vision.NETWORKS, **transformers_signals.NETWORKS}
CLASSIFIERS = ("hf_distilbert", "hf_electra", "hf_vit", "hf_resnet", "hf_wav2vec2")  # logits and own loss
LABELLED = ("hf_bert_mlm", "hf_gpt2", "hf_llama_gqa", "hf_opt", "hf_bert_tagger", "hf_bart")  # the model's own loss
STEPS, CUT, TARGET = 6, 4, 0.7

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own


@pytest.fixture(scope="module", autouse=True)
def transformers():
    prepare_for("transformers")


class Training:
    """A network with all that trains and prunes it; batches depend on the step alone."""

    def __init__(self, name, state=None):
        torch.manual_seed(0)
        self.network = BUILDERS[name]()
        self.model, self.labelled = self.network.model, name in LABELLED
        for module in self.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if state is not None:
            flatprune.take_tensors(self.model, state["model"], attributes=state["pruner"]["attributes"])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.curvature = flatprune.Curvature(self.model, factor_update_steps=2)
        self.pruner = flatprune.Pruner(
            self.model,
            self.optimizer,
            self.curvature,
            self.network.inputs(2),
            target=flatprune.Target(params=TARGET),
            total_steps=STEPS,
            schedule=CubicSchedule(STEPS, 0.3, 0.7, 2),
        )
        for part, own in ({} if state is None else self.parts()).items():
            own.load_state_dict(state[part])

    def parts(self):
        return {"optimizer": self.optimizer, "curvature": self.curvature, "pruner": self.pruner}

    def state(self):
        return {"model": self.model.state_dict(), **{name: part.state_dict() for name, part in self.parts().items()}}

    def step(self, number):
        torch.manual_seed(100 + number)
        inputs = self.network.inputs(5)
        self.optimizer.zero_grad()
        if self.labelled:
            labels = self.network.inputs(5)[next(iter(inputs))] % (5 if "Token" in type(self.model).__name__ else 200)
            labels[:, -4:] = -100
            loss = self.model(**inputs, labels=labels).loss
        else:
            logits = self.model(**inputs).logits
            loss = F.cross_entropy(logits, torch.arange(5) % logits.shape[1])
        loss.backward()
        self.optimizer.step()
        self.pruner.step()
        return float(loss)


@pytest.mark.parametrize(
    "name", thorough(CLASSIFIERS + LABELLED, but=["hf_electra", "hf_resnet", "hf_bert_mlm", "hf_llama_gqa"])
)
def test_training_cut_and_resume_without_a_wrapper(name):
    training = Training(name)
    for number in range(CUT):
        assert training.step(number) > 0
    assert training.pruner.params < training.pruner.params_start
    assert training.curvature._updates.pads == (name in LABELLED)
    file = io.BytesIO()
    torch.save(training.state(), file)
    file.seek(0)
    resumed = Training(name, torch.load(file, weights_only=True))
    for number in range(CUT, STEPS):
        assert resumed.step(number) == training.step(number)
    assert training.pruner.params <= 1.01 * TARGET * training.pruner.params_start
    found, expected = resumed.model.state_dict(), training.model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert torch.equal(resumed.curvature.factors.buffer, training.curvature.factors.buffer)
