"""Networks of timm, most of them its small ones; transformers with fewer blocks."""

from __future__ import annotations

import importlib
from typing import Any

from bench.zoo.network import Builder, Network, images

PACKAGE = "timm"


def model(name: str, size: int = 64, **options: Any) -> Builder:
    """The model `name` for ten classes and images of `size`."""

    def build() -> Network:
        import timm

        return Network(timm.create_model(name, pretrained=False, num_classes=10, **options).train(), images(size))

    return build


def built(name: str, size: int = 64, **options: Any) -> Builder:
    """A class of timm with options that its named models do not take: "module.Class"."""

    def build() -> Network:
        module, _, kind = name.partition(".")
        source = importlib.import_module(f"timm.models.{module}")
        made = {key: value(source) if callable(value) else value for key, value in options.items()}
        return Network(getattr(source, kind)(num_classes=10, **made), images(size))

    return build


CONVOLUTIONAL = [
    "convnext_atto",
    "convnextv2_atto",
    "dla34",
    "dpn48b",
    "ecaresnet26t",
    "edgenext_xx_small",
    "efficientnet_lite0",
    "efficientnetv2_rw_t",
    "fastvit_t8",
    "gernet_s",
    "ghostnet_050",
    "hardcorenas_a",
    "hgnet_tiny",
    "inception_next_atto",
    "lcnet_050",
    "mambaout_femto",
    "mobilenetv3_small_100",
    "mobilenetv4_conv_small",
    "mobileone_s0",
    "nf_resnet26",
    "poolformer_s12",
    "regnety_002",
    "repghostnet_050",
    "repvgg_a0",
    "repvit_m0_9",
    "resnest14d",
    "resnet18d",
    "resnet26t",
    "rexnet_100",
    "semnasnet_075",
    "skresnet18",
    "starnet_s1",
    "tf_efficientnet_b0",
    "tinynet_e",
]
SHORT = {"depth": 2}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": {"img_size": 64, "embed_dim": 192, "num_heads": 3, **SHORT},
    "cait_xxs24_224": {"img_size": 64, **SHORT},
    "coat_tiny": {"img_size": 64, "serial_depths": (1, 1, 1, 1), "parallel_depth": 1},
    "crossvit_tiny_240": {"img_size": 240, "size": 240, "depth": ((1, 1, 0), (1, 1, 0), (1, 1, 0))},
    "davit_tiny": {"depths": (1, 1, 1, 1), "embed_dims": (32, 64, 96, 128), "num_heads": (1, 2, 3, 4), "size": 112},
    "deit_tiny_distilled_patch16_224": {"img_size": 64, **SHORT},
    "efficientformer_l1": {"size": 224},
    "efficientvit_b0": {},
    "efficientvit_m0": {"img_size": 64},
    "eva02_tiny_patch14_224": {"img_size": 56, "size": 56, **SHORT},
    "flexivit_small": {"img_size": 64, **SHORT},
    "levit_128s": {"size": 224},
    "maxvit_pico_rw_256": {"img_size": 64, "depths": (1, 1, 1, 1)},
    "mobilevit_xxs": {},
    "mobilevitv2_050": {},
    "pit_ti_224": {"img_size": 64, "depth": (1, 1, 1)},
    "pvt_v2_b0": {},
    "swin_tiny_patch4_window7_224": {"img_size": 56, "size": 56, "depths": (1, 1, 1, 1)},
    "swinv2_tiny_window8_256": {"img_size": 64, "depths": (1, 1, 1, 1)},
    "sebotnet33ts_256": {"size": 256},
    "tiny_vit_5m_224": {},
    "twins_svt_small": {"size": 224, "depths": (1, 1, 2, 1)},
    "visformer_tiny": {"img_size": 64},
    "vit_tiny_patch16_224": {"img_size": 64, **SHORT},
    "vit_relpos_small_patch16_224": {"img_size": 64, **SHORT},
    "vit_small_patch16_dinov3": {"img_size": 64, **SHORT},
    "xcit_nano_12_p16_224": {"img_size": 64, **SHORT},
    "coatnet_nano_rw_224": {"img_size": 64, "depths": (1, 1, 1, 1)},
}
STAGES = {"depths": (1, 1, 1, 1)}
MIXER = {"img_size": 64, "patch_size": 16, "num_blocks": 2, "embed_dim": 96}
BUILT: dict[str, Builder] = {
    "timm_convmixer": built("convmixer.ConvMixer", dim=64, depth=2),
    "timm_focalnet": built("focalnet.FocalNet", embed_dim=32, **STAGES),
    "timm_gcvit": built(
        "gcvit.GlobalContextVit", img_size=64, window_size=(2, 2, 2, 2), embed_dim=32, num_heads=(1, 2, 4, 8), **STAGES
    ),
    "timm_caformer": built(
        "metaformer.MetaFormer",
        dims=(32, 48, 64, 96),
        token_mixers=lambda m: [m.SepConv, m.SepConv, m.Attention, m.Attention],
        norm_layers=lambda m: [m.LayerNorm2dNoBias] * 2 + [m.LayerNormNoBias] * 2,
        **STAGES,
    ),
    "timm_mixer": built("mlp_mixer.MlpMixer", **MIXER),
    "timm_gmlp": built(
        "mlp_mixer.MlpMixer",
        block_layer=lambda m: m.SpatialGatingBlock,
        mlp_layer=lambda m: m.GatedMlp,
        mlp_ratio=6,
        **MIXER,
    ),
    "timm_resmlp": built(
        "mlp_mixer.MlpMixer", block_layer=lambda m: m.ResBlock, norm_layer=lambda m: m.Affine, mlp_ratio=4, **MIXER
    ),
    "timm_mvitv2": built("mvitv2.MultiScaleVit", img_size=64, cfg=lambda m: m.MultiScaleVitCfg(**STAGES)),
    "timm_nest": built("nest.Nest", img_size=64, embed_dims=(32, 48, 64), num_heads=(2, 3, 4), depths=(1, 1, 2)),
    "timm_volo": built(
        "volo.VOLO", img_size=64, layers=(1, 1, 1, 1), embed_dims=(48, 96, 96, 96), num_heads=(2, 4, 4, 4)
    ),
}
NETWORKS: dict[str, Builder] = {
    **{f"timm_{name}": model(name) for name in CONVOLUTIONAL},
    **{f"timm_{name}": model(name, **options) for name, options in TRANSFORMERS.items()},
    **BUILT,
}
