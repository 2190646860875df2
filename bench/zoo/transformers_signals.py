"""Models of transformers for speech, sound and time series."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.zoo.network import Builder, by_name, classes_last, named, whole_numbers
from bench.zoo.transformers_common import hugging

PACKAGE = "transformers"
SPEECH: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "conv_dim": (32, 32, 32),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 3),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 32,
    "num_labels": 5,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
}
LISTENER = {
    "vocab_size": 200,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_source_positions": 50,
    "max_target_positions": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "use_cache": False,
}
PATCHES = {
    "num_input_channels": 3,
    "context_length": 32,
    "patch_length": 8,
    "patch_stride": 8,
    "d_model": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "ffn_dim": 64,
    "num_targets": 5,
}


def samples(n: int) -> Tensor:
    """A tenth of a second of sound."""
    return torch.randn(n, 1600)


def words(n: int) -> Tensor:
    """What was said."""
    return whole_numbers(n, 8)


def speech(kind: str, **settings: Any) -> Builder:
    """A classifier of raw sound."""
    return hugging(f"{kind}ForSequenceClassification", by_name(input_values=samples), **{**SPEECH, **settings})


NETWORKS: dict[str, Builder] = {
    "hf_wav2vec2": speech("Wav2Vec2"),
    "hf_wav2vec2_stable": speech("Wav2Vec2", do_stable_layer_norm=True, feat_extract_norm="layer"),
    "hf_wav2vec2_ctc": hugging(
        "Wav2Vec2ForCTC", by_name(input_values=samples), classes_last("logits"), **SPEECH, vocab_size=20
    ),
    "hf_hubert": speech("Hubert"),
    "hf_wavlm": speech("WavLM", num_buckets=16, max_bucket_distance=32),
    "hf_unispeech_sat": speech("UniSpeechSat"),
    "hf_sew": speech("SEW", squeeze_factor=2),
    "hf_data2vec_audio": speech("Data2VecAudio"),
    "hf_audio_spectrogram": hugging(
        "ASTForAudioClassification",
        by_name(input_values=lambda n: torch.randn(n, 32, 16)),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_length=32,
        num_mel_bins=16,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
        num_labels=5,
    ),
    "hf_whisper": hugging(
        "WhisperForConditionalGeneration",
        by_name(input_features=lambda n: torch.randn(n, 40, 100), decoder_input_ids=words),
        classes_last("logits"),
        **LISTENER,
        num_mel_bins=40,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    ),
    "hf_whisper_classifier": hugging(
        "WhisperForAudioClassification",
        by_name(input_features=lambda n: torch.randn(n, 40, 100)),
        **LISTENER,
        num_mel_bins=40,
        num_labels=5,
        classifier_proj_size=32,
    ),
    "hf_speech_to_text": hugging(
        "Speech2TextForConditionalGeneration",
        by_name(input_features=lambda n: torch.randn(n, 40, 20), decoder_input_ids=words),
        classes_last("logits"),
        **LISTENER,
        input_feat_per_channel=20,
        conv_channels=32,
        num_conv_layers=2,
    ),
    "hf_patchtst": hugging(
        "PatchTSTForClassification",
        by_name(past_values=lambda n: torch.randn(n, 32, 3)),
        named("prediction_logits"),
        **PATCHES,
    ),
    "hf_patchtsmixer": hugging(
        "PatchTSMixerForTimeSeriesClassification",
        by_name(past_values=lambda n: torch.randn(n, 32, 3)),
        named("prediction_outputs"),
        **PATCHES,
        num_layers=2,
    ),
}
