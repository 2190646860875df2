"""Vision models of transformers, and those that see and read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.zoo.network import Builder, Inputs, classes_last, named, whole_numbers
from bench.zoo.transformers_common import hugging, pixels

PACKAGE = "transformers"
VIT: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
}
STAGES = {"depths": [1, 1, 2, 1], "hidden_sizes": [16, 32, 48, 64]}
PYRAMID = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64], "num_attention_heads": [1, 2, 2, 4]}
WINDOWS = {"image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
CLIP = {
    "text_config": {**VIT, "vocab_size": 200, "max_position_embeddings": 32, "eos_token_id": 2, "pad_token_id": 1},
    "vision_config": VIT,
}


def classifier(kind: str, size: int = 32, **settings: Any) -> Builder:
    """A classifier of images of `size`."""
    return hugging(f"{kind}ForImageClassification", pixels(size), **{"num_labels": 10, **settings})


def video(frames: int, size: int) -> Callable[[int], Inputs]:
    """Maker of films."""
    return lambda n: {"pixel_values": torch.randn(n, frames, 3, size, size)}


def image_and_words(n: int) -> Inputs:
    """One sentence an image."""
    return {"input_ids": whole_numbers(n, 8), "pixel_values": torch.randn(n, 3, 32, 32)}


def similarities(output: Any) -> Tensor:
    """How well each sentence of a batch fits an image, before the outcome is scaled."""
    return output.text_embeds * output.image_embeds


CLASSIFIERS: dict[str, Builder] = {
    "hf_vit": classifier("ViT", **VIT),
    "hf_deit": classifier("DeiT", **VIT),
    "hf_beit": classifier("Beit", **VIT, use_relative_position_bias=True),
    "hf_dinov2": classifier("Dinov2", **VIT, mlp_ratio=2),
    "hf_dinov2_swiglu": classifier("Dinov2", **VIT, mlp_ratio=2, use_swiglu_ffn=True),
    "hf_vit_msn": classifier("ViTMSN", **VIT),
    "hf_siglip": hugging("SiglipForImageClassification", pixels(), vision_config=VIT, num_labels=10),
    "hf_clip_classifier": hugging("CLIPForImageClassification", pixels(), vision_config=VIT, num_labels=10),
    "hf_swin": classifier("Swin", **WINDOWS),
    "hf_swinv2": classifier("Swinv2", **WINDOWS),
    "hf_convnext": classifier("ConvNext", **STAGES),
    "hf_convnextv2": classifier("ConvNextV2", **STAGES),
    "hf_resnet": classifier("ResNet", embedding_size=16, **STAGES),
    "hf_resnet_bottleneck": classifier("ResNet", embedding_size=16, layer_type="bottleneck", **STAGES),
    "hf_bit": classifier("Bit", embedding_size=32, depths=[1, 1, 2, 1], hidden_sizes=[32, 64, 96, 128], num_groups=8),
    "hf_regnet": classifier("RegNet", embedding_size=16, groups_width=8, **STAGES),
    "hf_mobilenet_v1": classifier("MobileNetV1", image_size=32, depth_multiplier=0.25),
    "hf_mobilenet_v2": classifier("MobileNetV2", image_size=32, depth_multiplier=0.35),
    "hf_mobilevit": classifier(
        "MobileViT", 64, image_size=64, hidden_sizes=[32, 48, 64], neck_hidden_sizes=[16, 24, 32, 48, 64, 64, 128]
    ),
    "hf_mobilevitv2": classifier("MobileViTV2", 64, image_size=64, width_multiplier=0.25),
    "hf_efficientnet": classifier("EfficientNet", width_coefficient=0.5, depth_coefficient=0.5, hidden_dim=640),
    "hf_segformer_classifier": classifier("Segformer", **PYRAMID),
    "hf_poolformer": classifier("PoolFormer", depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 48, 64]),
    "hf_pvt": classifier("Pvt", image_size=32, **PYRAMID),
    "hf_pvt_v2": classifier("PvtV2", image_size=32, **PYRAMID),
    "hf_cvt": classifier("Cvt", embed_dim=[16, 32, 64], num_heads=[1, 2, 4], depth=[1, 2, 3]),
    "hf_levit": classifier(
        "Levit",
        64,
        image_size=64,
        hidden_sizes=[32, 64, 96],
        num_attention_heads=[2, 4, 6],
        key_dim=[16, 16, 16],
        depths=[2, 2, 2],
    ),
    "hf_focalnet": classifier("FocalNet", image_size=32, embed_dim=32, depths=[2, 2], focal_levels=[2, 2]),
    "hf_hiera": classifier(
        "Hiera",
        64,
        image_size=[64, 64],
        embed_dim=32,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 4, 8],
        mask_unit_size=[2, 2],
    ),
    "hf_swiftformer": classifier("SwiftFormer", 64, embed_dims=[16, 32, 48, 64], depths=[1, 1, 1, 1]),
}
OTHERS: dict[str, Builder] = {
    "hf_segformer": hugging(
        "SegformerForSemanticSegmentation", pixels(64), **PYRAMID, decoder_hidden_size=48, num_labels=6
    ),
    "hf_dpt": hugging(
        "DPTForSemanticSegmentation",
        pixels(),
        **{**VIT, "num_hidden_layers": 4},
        num_labels=6,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16, 32, 48, 64],
        fusion_hidden_size=32,
        use_auxiliary_head=False,
    ),
    "hf_vit_mae": hugging(
        "ViTMAEForPreTraining",
        pixels(),
        named("logits"),
        "mse",
        **VIT,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
        mask_ratio=0.0,
    ),
    "hf_swin_mim": hugging(
        "SwinForMaskedImageModeling", pixels(), named("reconstruction"), "mse", **WINDOWS, encoder_stride=8
    ),
    "hf_swin2sr": hugging(
        "Swin2SRForImageSuperResolution",
        pixels(16),
        named("reconstruction"),
        "mse",
        image_size=16,
        embed_dim=32,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=4,
        upscale=2,
    ),
    "hf_yolos": hugging(
        "YolosForObjectDetection",
        pixels(),
        classes_last("logits"),
        **{**VIT, "image_size": [32, 32]},
        num_labels=4,
        num_detection_tokens=5,
    ),
    "hf_videomae": hugging(
        "VideoMAEForVideoClassification", video(4, 16), **{**VIT, "image_size": 16}, num_frames=4, num_labels=5
    ),
    "hf_timesformer": hugging(
        "TimesformerForVideoClassification", video(4, 16), **{**VIT, "image_size": 16}, num_frames=4, num_labels=5
    ),
    "hf_vivit": hugging(
        "VivitForVideoClassification",
        video(4, 16),
        **{**VIT, "image_size": 16},
        num_frames=4,
        num_labels=5,
        tubelet_size=[2, 8, 8],
    ),
    "hf_clip": hugging("CLIPModel", image_and_words, similarities, "mse", **CLIP, projection_dim=16),
    "hf_clip_vision": hugging(
        "CLIPVisionModelWithProjection", pixels(), named("image_embeds"), "mse", **VIT, projection_dim=16
    ),
    "hf_vilt": hugging(
        "ViltForQuestionAnswering", image_and_words, **VIT, vocab_size=200, max_position_embeddings=32, num_labels=4
    ),
    "hf_blip_text_image": hugging(
        "BlipForImageTextRetrieval",
        image_and_words,
        named("itm_score"),
        text_config={
            **VIT,
            "vocab_size": 200,
            "max_position_embeddings": 32,
            "encoder_hidden_size": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "sep_token_id": 2,
        },
        vision_config=VIT,
        image_text_hidden_size=16,
        projection_dim=16,
    ),
}
NETWORKS = {**CLASSIFIERS, **OTHERS}
