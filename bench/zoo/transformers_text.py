"""Language models of transformers: encoders, decoders, encoder-decoders."""

from __future__ import annotations

from typing import Any

from bench.zoo.network import Builder, classes_last, tokens
from bench.zoo.transformers_common import hugging

PACKAGE = "transformers"
SIZES: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}
NO_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # the defaults lie beyond 200 words


def encoder(kind: str, **settings: Any) -> Builder:
    """A classifier of sentences."""
    return hugging(f"{kind}ForSequenceClassification", tokens(), **{**SIZES, "num_labels": 4, **settings})


def masked(kind: str, **settings: Any) -> Builder:
    """A model that fills in words."""
    return hugging(f"{kind}ForMaskedLM", tokens(), classes_last("logits"), **{**SIZES, **settings})


def decoder(kind: str, **settings: Any) -> Builder:
    """A model of the next word; its cache is no output of the training."""
    settings = {**SIZES, **NO_TOKENS, "use_cache": False, **settings}
    return hugging(kind, tokens(), classes_last("logits"), **settings)


def pair(kind: str, **settings: Any) -> Builder:
    """An encoder-decoder."""
    inputs = tokens(10, "input_ids", "decoder_input_ids")
    settings = {**NO_TOKENS, "vocab_size": 200, "use_cache": False, "decoder_start_token_id": 1, **settings}
    return hugging(kind, inputs, classes_last("logits"), **settings)


GROUPED = {"num_attention_heads": 8, "num_key_value_heads": 2}  # four heads of queries share one of keys and values
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
BART = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 64,
    "forced_eos_token_id": 2,
}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}

ENCODERS: dict[str, Builder] = {
    "hf_bert": encoder("Bert"),
    "hf_bert_eager": encoder("Bert", attn_implementation="eager"),
    "hf_bert_mlm": masked("Bert"),
    "hf_bert_tagger": hugging("BertForTokenClassification", tokens(), classes_last("logits"), **SIZES, num_labels=5),
    "hf_distilbert": encoder("DistilBert", dim=64, n_layers=2, n_heads=4, hidden_dim=128),
    "hf_roberta": encoder("Roberta"),
    "hf_xlm_roberta_mlm": masked("XLMRoberta"),
    "hf_albert": encoder("Albert", embedding_size=32),
    "hf_electra": encoder("Electra", embedding_size=32),
    "hf_electra_mlm": masked("Electra", embedding_size=32),
    "hf_deberta": encoder("Deberta", relative_attention=True, pos_att_type=["c2p", "p2c"], pooler_hidden_size=64),
    "hf_deberta_v2": encoder(
        "DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"], pooler_hidden_size=64, share_att_key=True
    ),
    "hf_mpnet": encoder("MPNet"),
    "hf_modernbert": encoder("ModernBert", **NO_TOKENS, cls_token_id=1, sep_token_id=2, attn_implementation="sdpa"),
    "hf_roformer": encoder("RoFormer", embedding_size=64),
    "hf_squeezebert": encoder("SqueezeBert", embedding_size=64),
    "hf_mobilebert": encoder("MobileBert", embedding_size=32, intra_bottleneck_size=32, true_hidden_size=32),
    "hf_convbert": encoder("ConvBert", embedding_size=64),
    "hf_fnet": encoder("FNet"),
    "hf_esm_mlm": masked("Esm", pad_token_id=1, mask_token_id=4, position_embedding_type="rotary"),
}
DECODERS: dict[str, Builder] = {
    "hf_gpt2": decoder("GPT2LMHeadModel", **GPT2),
    "hf_gpt_neo": decoder(
        "GPTNeoForCausalLM", num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=4
    ),
    "hf_gpt_neox": decoder("GPTNeoXForCausalLM"),
    "hf_gptj": decoder("GPTJForCausalLM", **GPT2, rotary_dim=8),
    "hf_opt": decoder("OPTForCausalLM", ffn_dim=128, word_embed_proj_dim=64),
    "hf_bloom": decoder("BloomForCausalLM", n_layer=2, n_head=4),
    "hf_mpt": decoder("MptForCausalLM", d_model=64, n_heads=4, n_layers=2, max_seq_len=64),
    "hf_llama_gqa": decoder("LlamaForCausalLM", **GROUPED),
    "hf_llama_tied": decoder("LlamaForCausalLM", tie_word_embeddings=True),
    "hf_llama_classifier": encoder("Llama", **NO_TOKENS, **GROUPED, use_cache=False),
    "hf_mistral": decoder("MistralForCausalLM", **GROUPED, sliding_window=8),
    "hf_mixtral": decoder("MixtralForCausalLM", **EXPERTS),
    "hf_mixtral_eager": decoder("MixtralForCausalLM", **EXPERTS, experts_implementation="eager"),
    "hf_qwen2": decoder("Qwen2ForCausalLM", **GROUPED),
    "hf_qwen2_moe": decoder(
        "Qwen2MoeForCausalLM", num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=48, **GROUPED
    ),
    "hf_qwen3": decoder("Qwen3ForCausalLM", head_dim=16, **GROUPED),
    "hf_gemma": decoder("GemmaForCausalLM", head_dim=16, **GROUPED),
    "hf_gemma2": decoder("Gemma2ForCausalLM", head_dim=16, **GROUPED),
    "hf_gemma3": decoder("Gemma3ForCausalLM", head_dim=16, **GROUPED),
    "hf_phi": decoder("PhiForCausalLM"),
    "hf_phi3": decoder("Phi3ForCausalLM", **GROUPED),
    "hf_falcon": decoder("FalconForCausalLM", multi_query=True),
    "hf_stablelm": decoder("StableLmForCausalLM", **GROUPED),
    "hf_olmo2": decoder("Olmo2ForCausalLM", **GROUPED),
    "hf_starcoder2": decoder("Starcoder2ForCausalLM", **GROUPED),
    "hf_cohere": decoder("CohereForCausalLM", **GROUPED),
    "hf_deepseek_v3": decoder(
        "DeepseekV3ForCausalLM",
        **LATENT,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        num_key_value_heads=4,
    ),
    "hf_gpt_oss": decoder("GptOssForCausalLM", head_dim=16, layer_types=None, **EXPERTS),
    "hf_mamba": decoder("MambaForCausalLM", state_size=8),
    "hf_xglm": decoder("XGLMForCausalLM", d_model=64, ffn_dim=128, num_layers=2, attention_heads=4),
}
PAIRS: dict[str, Builder] = {
    "hf_t5": pair("T5ForConditionalGeneration", **T5),
    "hf_t5_gated": pair("T5ForConditionalGeneration", **T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "hf_t5_tagger": hugging("T5ForTokenClassification", tokens(), classes_last("logits"), **T5, vocab_size=200),
    "hf_bart": pair("BartForConditionalGeneration", **BART),
    "hf_mbart": pair("MBartForConditionalGeneration", **BART),
    "hf_pegasus": pair("PegasusForConditionalGeneration", **BART),
    "hf_marian": pair("MarianMTModel", **BART),
}
NETWORKS = {**ENCODERS, **DECODERS, **PAIRS}
