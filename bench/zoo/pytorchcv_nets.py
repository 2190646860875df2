"""Convolutional networks of pytorchcv: what has been drawn up since 2012, in its smallest sizes."""

from __future__ import annotations

from bench.zoo.network import Builder, Network, images

PACKAGE = "pytorchcv"


def model(name: str, size: int) -> Builder:
    """The model `name` for ten classes and images of `size`."""

    def build() -> Network:
        from pytorchcv.model_provider import get_model

        return Network(get_model(name, pretrained=False, num_classes=10, in_size=(size, size)).train(), images(size))

    return build


SMALL_IMAGES = [
    "densenet40_k12_cifar10",
    "diaresnet20_cifar10",
    "nin_cifar10",
    "preresnet20_cifar10",
    "pyramidnet110_a48_cifar10",
    "resnet20_cifar10",
    "resnext29_32x4d_cifar10",
    "rir_cifar10",
    "seresnet20_cifar10",
    "shakeshakeresnet20_2x16d_cifar10",
    "wrn16_10_cifar10",
    "xdensenet40_2_k24_bc_cifar10",
]
LARGE_IMAGES = [
    "bam_resnet18",
    "bninception",
    "cbam_resnet18",
    "condensenet74_c4_g4",
    "diracnet18v2",
    "fbnet_cb",
    "hardnet39ds",
    "hrnet_w18_small_v1",
    "igcv3_wd2",
    "menet108_8x1_g3",
    "mobilenet_w1",
    "peleenet",
    "proxylessnas_cpu",
    "regnetx002",
    "shufflenet_g3_w1",
    "shufflenetv2_wd2",
    "shufflenetv2b_wd2",
    "spnasnet",
    "squeezenet_v1_0",
    "vovnet27s",
]
NETWORKS: dict[str, Builder] = {
    **{f"cv_{name}": model(name, 32) for name in SMALL_IMAGES},
    **{f"cv_{name}": model(name, 224) for name in LARGE_IMAGES},
}
