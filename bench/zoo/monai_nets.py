"""Networks of MONAI for medical images of two and three dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.zoo.network import Builder, Inputs, Network, images, itself, normal

PACKAGE = "monai.networks.nets"
CHANNELS = {"channels": (8, 16, 32), "strides": (2, 2)}


def model(
    kind: str,
    inputs: Callable[[int], Inputs],
    output: Callable[[Any], Tensor] = itself,
    loss: str = "cross_entropy",
    **options: Any,
) -> Builder:
    """The class `kind`."""

    def build() -> Network:
        from monai.networks import nets

        return Network(getattr(nets, kind)(**options).train(), inputs, output, loss)

    return build


def volumes(size: int) -> Callable[[int], Inputs]:
    """Maker of cubes of one channel."""
    return normal(1, size, size, size)


def noisy(n: int) -> Inputs:
    """Images and the time step of their noise."""
    return torch.randn(n, 1, 16, 16), torch.randint(0, 100, (n,))


def first(output: Any) -> Tensor:
    """The first of several tensors."""
    return output[0]


PLANE: dict[str, Any] = {"spatial_dims": 2, "in_channels": 1, "out_channels": 3}
SPACE: dict[str, Any] = {"spatial_dims": 3, "in_channels": 1, "out_channels": 3}
KERNELS = {"kernel_size": (3, 3, 3), "strides": (1, 2, 2), "upsample_kernel_size": (2, 2), "filters": (8, 16, 32)}
NETWORKS: dict[str, Builder] = {
    "monai_unet2d": model("UNet", images(32, 1), num_res_units=2, **PLANE, **CHANNELS),
    "monai_unet2d_plain": model("UNet", images(32, 1), norm="batch", act="relu", **PLANE, **CHANNELS),
    "monai_unet3d": model("UNet", volumes(16), num_res_units=2, **SPACE, **CHANNELS),
    "monai_unet3d_batch": model("UNet", volumes(16), norm="batch", **SPACE, **CHANNELS),
    "monai_basicunet2d": model("BasicUNet", images(32, 1), features=(8, 8, 16, 16, 32, 8), **PLANE),
    "monai_attention_unet": model("AttentionUnet", images(32, 1), **PLANE, **CHANNELS),
    "monai_dynunet": model("DynUNet", images(32, 1), res_block=True, **PLANE, **KERNELS),
    "monai_dynunet3d": model("DynUNet", volumes(16), **SPACE, **KERNELS),
    "monai_segresnet2d": model("SegResNet", images(32, 1), init_filters=8, **PLANE),
    "monai_segresnet3d": model("SegResNet", volumes(16), init_filters=8, **SPACE),
    "monai_highresnet": model("HighResNet", images(32, 1), **PLANE),
    "monai_densenet121": model("DenseNet121", images(64, 1), **PLANE),
    "monai_resnet3d": model("resnet10", volumes(16), spatial_dims=3, n_input_channels=1, num_classes=3),
    "monai_unetr": model(
        "UNETR",
        volumes(32),
        in_channels=1,
        out_channels=3,
        img_size=32,
        feature_size=8,
        hidden_size=48,
        mlp_dim=96,
        num_heads=4,
    ),
    "monai_swin_unetr": model("SwinUNETR", images(64, 1), feature_size=12, depths=(1, 1, 1, 1), **PLANE),
    "monai_vit3d": model(
        "ViT",
        volumes(16),
        first,
        in_channels=1,
        img_size=(16, 16, 16),
        patch_size=(8, 8, 8),
        hidden_size=48,
        mlp_dim=96,
        num_layers=2,
        num_heads=4,
        classification=True,
        num_classes=3,
        post_activation="",
    ),
    "monai_autoencoder": model(
        "AutoEncoder",
        images(32, 1),
        loss="mse",
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        channels=(8, 16),
        strides=(2, 2),
    ),
    "monai_diffusion": model(
        "DiffusionModelUNet",
        noisy,
        loss="mse",
        **{**PLANE, "out_channels": 1},
        channels=(16, 32),
        num_res_blocks=1,
        attention_levels=(False, True),
        num_head_channels=8,
        norm_num_groups=8,
    ),
    "monai_discriminator": model(
        "PatchDiscriminator",
        images(32, 1),
        lambda output: output[-1],
        "mse",
        spatial_dims=2,
        in_channels=1,
        channels=8,
        num_layers_d=2,
    ),
    "monai_mednext": model("MedNeXt", images(32, 1), init_filters=8, **PLANE),
}
