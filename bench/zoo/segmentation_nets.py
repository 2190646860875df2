"""Decoders of segmentation-models-pytorch on small encoders."""

from __future__ import annotations

from typing import Any

from bench.zoo.network import Builder, Network, images

PACKAGE = "segmentation_models_pytorch"


def model(kind: str, encoder: str, size: int = 64, **options: Any) -> Builder:
    """The decoder `kind` for four classes a pixel."""

    def build() -> Network:
        import segmentation_models_pytorch as smp

        net = getattr(smp, kind)(encoder, encoder_weights=None, classes=4, **options)
        return Network(net.train(), images(size))

    return build


NETWORKS: dict[str, Builder] = {
    "smp_unet_resnet18": model("Unet", "resnet18"),
    "smp_unet_scse": model("Unet", "mobilenet_v2", decoder_attention_type="scse"),
    "smp_unetplusplus": model("UnetPlusPlus", "mobilenet_v2"),
    "smp_fpn": model("FPN", "mobilenet_v2"),
    "smp_linknet": model("Linknet", "resnet18"),
    "smp_pspnet": model("PSPNet", "resnet18", encoder_depth=5),
    "smp_pan": model("PAN", "mobilenet_v2", 128),
    "smp_manet": model("MAnet", "resnet18"),
    "smp_deeplabv3plus": model("DeepLabV3Plus", "mobilenet_v2"),
    "smp_segformer": model("Segformer", "mit_b0"),
    "smp_upernet": model("UPerNet", "resnet18"),
}
