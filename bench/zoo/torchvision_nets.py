"""Networks of torchvision: classification, segmentation, detection, film."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bench.zoo.network import Builder, Network, images, named, normal

PACKAGE = "torchvision"
BARE = {"aux_logits": False, "init_weights": False}


def classifier(name: str, size: int = 64, **options: Any) -> Builder:
    """The model `name` for ten classes and images of `size`."""

    def build() -> Network:
        from torchvision import models

        return Network(models.get_model(name, weights=None, num_classes=10, **options), images(size))

    return build


def segmenter(name: str) -> Builder:
    """The model `name` for five classes a pixel."""

    def build() -> Network:
        from torchvision import models

        model = models.get_model(name, weights=None, weights_backbone=None, num_classes=5)
        return Network(model, images(64), named("out"))

    return build


def short_swin() -> Network:
    """A Swin transformer of the second version with four blocks."""
    from torchvision.models import swin_transformer as swin

    model = swin.SwinTransformer(
        [4, 4],
        48,
        [2, 2],
        [3, 6],
        [4, 4],
        num_classes=10,
        block=swin.SwinTransformerBlockV2,
        downsample_layer=swin.PatchMergingV2,
    )
    return Network(model, images(64))


def vit() -> Network:
    """A vision transformer with nn.MultiheadAttention."""
    from torchvision.models import VisionTransformer

    return Network(VisionTransformer(32, 8, 3, 4, 64, 128, num_classes=10), images(32))


def maxvit() -> Network:
    """Convolutions and attention in windows and grids."""
    from torchvision.models import MaxVit

    model = MaxVit((64, 64), 32, 2, [32, 64], [1, 1], 16, 0.0, num_classes=10)
    return Network(model, images(64))


def film(name: str, *shape: int) -> Builder:
    """A classifier of films of (frames, height, width)."""

    def build() -> Network:
        from torchvision.models import video

        return Network(getattr(video, name)(weights=None, num_classes=5), normal(3, *shape))

    return build


class Detector(nn.Module):
    """What of a detector is trained, without anchors and suppression: a pyramid and a head on each of its levels."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x: Tensor) -> Tensor:
        """Scores [n, classes, anchors over all levels] of images [n, 3, h, w]."""
        return self.head(list(self.backbone(x).values())).transpose(1, 2)


def detector() -> Network:
    """ResNet-18 with frozen batch norms, a feature pyramid and RetinaNet's classification head."""
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.models.detection.retinanet import RetinaNetClassificationHead

    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    return Network(Detector(backbone, RetinaNetClassificationHead(256, 3, 5)), images(64))


CLASSIFIERS = (
    ("resnet18", {}),
    ("resnet50", {}),
    ("mobilenet_v2", {}),
    ("mobilenet_v3_small", {}),
    ("efficientnet_b0", {}),
    ("densenet121", {}),
    ("shufflenet_v2_x0_5", {}),
    ("squeezenet1_1", {}),
    ("regnet_y_400mf", {}),
    ("mnasnet0_5", {}),
    ("googlenet", BARE),
    ("inception_v3", {"size": 96, **BARE}),
    ("convnext_tiny", {}),
    ("swin_t", {}),
)
NETWORKS: dict[str, Builder] = {
    **{f"tv_{name}": classifier(name, **options) for name, options in CLASSIFIERS},
    "tv_swin_v2_short": short_swin,
    "tv_vit": vit,
    "tv_maxvit": maxvit,
    "tv_deeplabv3": segmenter("deeplabv3_mobilenet_v3_large"),
    "tv_lraspp": segmenter("lraspp_mobilenet_v3_large"),
    "tv_retinanet": detector,
    "tv_r3d_18": film("r3d_18", 4, 32, 32),
}
