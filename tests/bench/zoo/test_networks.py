"""A dozen networks of transformers: what could go, a cut against the masked network, training after it."""

import pytest
import torch

from bench.zoo import transformers_signals, transformers_text, transformers_vision
from bench.zoo.checks import AMOUNTS, agree, cut_and_masked, find, outcome, train
from tests.conftest import prepare_for, thorough

BUILDERS = {**transformers_text.NETWORKS, **transformers_vision.NETWORKS, **transformers_signals.NETWORKS}
COULD_GO = {  # at least
    "hf_bert": 0.95,
    "hf_gpt2": 0.95,
    "hf_llama_gqa": 0.95,
    "hf_mixtral": 0.95,
    "hf_qwen3": 0.95,
    "hf_t5": 0.95,
    "hf_bart": 0.95,
    "hf_vit": 0.95,
    "hf_swin": 0.95,
    "hf_convnextv2": 0.95,
    "hf_resnet": 0.95,
    "hf_wav2vec2": 0.95,
    "hf_whisper": 0.95,
}

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own


@pytest.fixture(scope="module", autouse=True)
def transformers():
    prepare_for("transformers")


@pytest.mark.parametrize("name", thorough(COULD_GO, but=["hf_bert", "hf_llama_gqa", "hf_wav2vec2"]))
def test_nearly_everything_can_go_and_a_cut_is_what_masking_is(name):
    network = BUILDERS[name]()
    coupling, record = find(network)
    assert record["could_go"] >= COULD_GO[name], record["refused"]
    for amount in AMOUNTS.values():
        found = cut_and_masked(network, coupling, amount)
        assert agree(outcome(found)), found
        assert outcome(found)["effect"] > 0


@pytest.mark.parametrize("name", thorough(["hf_bert", "hf_llama_gqa", "hf_convnextv2"], but=["hf_llama_gqa"]))
@pytest.mark.parametrize("criterion", thorough(["l1", "obs"], but=["obs"]))
def test_training_goes_on_after_half_the_parameters_went(name, criterion):
    torch.manual_seed(0)
    record = train(BUILDERS[name](), criterion)
    assert "error" not in record
    assert record["left"] <= 0.51
