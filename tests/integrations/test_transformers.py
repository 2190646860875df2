"""The Trainer of transformers, with pruning in it: targets, checkpoints that go on, saved folders that load."""

import os
from importlib.util import find_spec

import pytest
import torch

import flatprune
from flatprune.errors import InputError
from tests.conftest import thorough
from tests.distributed.ranks import Ranks

needed = ("transformers", "accelerate")
pytestmark = [
    pytest.mark.skipif(any(find_spec(name) is None for name in needed), reason="transformers, accelerate"),
    pytest.mark.filterwarnings("ignore"),
]
STEPS = 12


class Sentences(torch.utils.data.Dataset):
    """Tokens whose first one says the class."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        tokens = torch.randint(4, 60, (8,), generator=torch.Generator().manual_seed(index))
        label = index % 3
        tokens[0] = 10 + label
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": torch.tensor(label)}


class Pictures(torch.utils.data.Dataset):
    """Images whose brightness says the class."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        noise = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": 0.3 * noise + index % 3, "labels": torch.tensor(index % 3)}


def vit():
    """Its checkpoints call its tensors otherwise than it does."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes))


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(
        BertConfig(vocab_size=60, max_position_embeddings=16, num_labels=3, **sizes, **dropout)
    )


def trainer(folder, target=0.5, pruning=None, build=bert, **options):
    from transformers import TrainingArguments

    from flatprune.integrations.transformers import PruningTrainer

    options = {"max_steps": STEPS, "save_strategy": "no", **options}
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        **options,
    )
    schedule = flatprune.CubicSchedule(STEPS, 0.2, 0.7, every=3)
    made = {"schedule": schedule, "curvature": {"generator": torch.Generator().manual_seed(0)}, **(pruning or {})}
    data = Sentences() if build is bert else Pictures()
    return PruningTrainer(build(), arguments, train_dataset=data, eval_dataset=data, target=target, pruning=made)


OPTIONS = [{}, {"gradient_accumulation_steps": 2}, {"label_smoothing_factor": 0.1}]


@pytest.mark.parametrize("options", thorough(OPTIONS, seldom=[{}]))
def test_the_target_is_reached(tmp_path, options):
    run = trainer(tmp_path, **options)
    before = sum(p.numel() for p in run.model.parameters())
    run.train()
    events = {entry["step"]: entry for entry in run.state.log_history if "event/removed" in entry}
    history = run.pruning.pruner.history
    assert list(events) == sorted({record.step for record in history})
    assert sum(entry["event/removed"] for entry in events.values()) == sum(record.removed for record in history)
    epoch, now = run.state.log_history[-2], run.pruning.scalars()  # the last one is the Trainer's summary
    assert now.items() <= epoch.items() and now["curvature/spectral_radius"] > 0.0
    widths = {name: value for name, value in now.items() if name.startswith("width/")}
    assert widths and widths.items() <= events[history[-1].step].items()
    assert sum(p.numel() for p in run.model.parameters()) <= 1.01 * 0.5 * before
    assert run.pruning.pruner.step_count == STEPS and run.pruning.finished
    assert run.pruning.flatness.floors is not None  # its warm-up is over
    assert not run.model._forward_hooks


@pytest.mark.parametrize("build", [bert, vit])
def test_a_checkpoint_resumes_the_pruned_network(tmp_path, build):
    options = {"build": build, "save_strategy": "steps", "save_steps": 6}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = trainer(tmp_path / "whole", **options)
    full = sum(p.numel() for p in resumed.model.parameters())
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-6"))
    assert sum(p.numel() for p in resumed.model.parameters()) < full
    assert resumed.pruning.pruner.widths() == whole.pruning.pruner.widths()
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("greater", [True, False])
def test_the_best_network_is_of_the_final_size(tmp_path, greater):
    """Whether the loss of the whole network is called better than that of the pruned one, or worse."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": greater}
    run = trainer(tmp_path, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, build=vit, **best)
    run.train()
    last = run.pruning.pruner.history[-1].step
    losses = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    candidates = {step: loss for step, loss in losses.items() if step >= last}
    assert last > 1 and len(candidates) > 2
    assert run.state.best_metric == (max if greater else min)(candidates.values())
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric)


@pytest.mark.thorough
def test_processes_prune_the_same_neurons(tmp_path):
    ranks = Ranks(2)
    try:
        first, second = ranks.run(trained_on_ranks, str(tmp_path))
    finally:
        ranks.close()
    assert first == second and first[0] < 0.51


def trained_on_ranks(folder):
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # which accelerate wants, and the group does not
    run = trainer(folder, ddp_backend="gloo")
    run.train()
    pruner = run.pruning.pruner
    weights = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    return pruner.params / pruner.params_start, pruner.widths(), float(weights.double().sum())


def test_what_would_go_wrong_is_refused(tmp_path):
    with pytest.raises(InputError, match="PruningTrainer: torch_compile hides layers"):
        trainer(tmp_path, torch_compile=True, torch_compile_backend="eager")

    def adapted():
        model = bert()
        model.peft_config = {"default": object()}
        return model

    with pytest.raises(InputError, match=r"PruningTrainer: .* PEFT's adapters"):
        trainer(tmp_path, build=adapted)


def test_a_saved_folder_loads_as_the_pruned_network(tmp_path):
    from transformers import BertForSequenceClassification

    from flatprune.integrations.transformers import load_pruned

    run = trainer(tmp_path / "run", pruning={"flatness": False})
    run.train()
    run.save_model(str(tmp_path / "saved"))
    loaded = load_pruned(BertForSequenceClassification, tmp_path / "saved")
    tokens = torch.stack([Sentences()[i]["input_ids"] for i in range(4)])
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, run.model.eval()(tokens).logits)
    (tmp_path / "saved/pruned_shapes.pt").unlink()
    with pytest.raises(InputError, match=r"pruned_shapes\.pt: no such file"):
        load_pruned(BertForSequenceClassification, tmp_path / "saved")
