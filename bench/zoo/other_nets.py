"""Networks of smaller packages: vit-pytorch, x-transformers, efficientnet_pytorch."""

from __future__ import annotations

import importlib
from typing import Any

from bench.zoo.network import Builder, Network, classes_last, images, normal, whole_numbers

VIT: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "num_classes": 10,
    "dim": 64,
    "depth": 2,
    "heads": 4,
    "mlp_dim": 128,
}


def vision(name: str, **options: Any) -> Builder:
    """A class of vit-pytorch, "module.Class", on small images."""

    def build() -> Network:
        module, _, kind = name.partition(".")
        return Network(getattr(importlib.import_module(f"vit_pytorch.{module}"), kind)(**options), images(32))

    return build


def wrapped(layers: str, **options: Any) -> Builder:
    """Layers of x-transformers between an embedding and logits."""

    def build() -> Network:
        import x_transformers as xt

        stack = getattr(xt, layers)(dim=64, depth=2, heads=4, **options)
        model = xt.TransformerWrapper(num_tokens=200, max_seq_len=32, attn_layers=stack)
        return Network(model, lambda n: (whole_numbers(n, 12),), classes_last())

    return build


def efficientnet() -> Network:
    """Convolutions that pad by hand."""
    from efficientnet_pytorch import EfficientNet

    return Network(EfficientNet.from_name("efficientnet-b0", num_classes=10), images(64))


def series() -> Network:
    """x-transformers on sequences of numbers."""
    import x_transformers as xt

    stack = xt.Encoder(dim=64, depth=2, heads=4)
    model = xt.ContinuousTransformerWrapper(dim_in=8, dim_out=5, max_seq_len=32, attn_layers=stack)
    return Network(model, normal(12, 8), classes_last())


NETWORKS: dict[str, Builder] = {
    "efficientnet_pytorch_b0": efficientnet,
    "vp_vit": vision("vit.ViT", **VIT),
    "vp_simple_vit": vision("simple_vit.SimpleViT", **VIT),
    "vp_deepvit": vision("deepvit.DeepViT", **VIT),
    "vp_parallel_vit": vision("parallel_vit.ViT", **VIT, num_parallel_branches=2),
    "vp_small_data_vit": vision("vit_for_small_dataset.ViT", **VIT),
    "vp_registers": vision("simple_vit_with_register_tokens.SimpleViT", **VIT),
    "vp_cait": vision("cait.CaiT", **VIT, cls_depth=1),
    "vp_cct": vision(
        "cct.CCT",
        img_size=(32, 32),
        embedding_dim=64,
        n_conv_layers=1,
        kernel_size=3,
        stride=1,
        padding=1,
        num_layers=2,
        num_heads=4,
        mlp_ratio=2.0,
        num_classes=10,
        positional_embedding="learnable",
    ),
    "vp_max_vit": vision("max_vit.MaxViT", num_classes=10, dim=32, depth=(1, 1), dim_head=16, window_size=2),
    "vp_cvt": vision("cvt.CvT", num_classes=10, s1_emb_dim=16, s2_emb_dim=32, s3_emb_dim=48, s3_depth=1),
    "xt_decoder": wrapped("Decoder"),
    "xt_encoder": wrapped("Encoder"),
    "xt_rotary_glu_rmsnorm": wrapped("Decoder", rotary_pos_emb=True, ff_glu=True, use_rmsnorm=True),
    "xt_grouped_queries": wrapped("Decoder", attn_kv_heads=2, alibi_pos_bias=True),
    "xt_series": series,
}
