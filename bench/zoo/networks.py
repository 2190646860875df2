"""All networks of the zoo by name, and which package each needs."""

from __future__ import annotations

import importlib
from importlib.util import find_spec

from bench.zoo.network import Builder

FILES = (
    "plain_vectors",
    "plain_images",
    "plain_joins",
    "plain_sequences",
    "transformers_text",
    "transformers_vision",
    "transformers_signals",
    "graph_nets",
    "monai_nets",
    "other_nets",
    "yolo_nets",
    "segmentation_nets",
    "torchvision_nets",
    "timm_nets",
    "pytorchcv_nets",
)
QUICK = (
    "plain_lstm_deep",
    "plain_unet3d",
    "join_groupnorm_4",
    "hf_bert",
    "hf_llama_gqa",
    "hf_t5",
    "hf_mixtral",
    "hf_swin",
    "hf_wav2vec2",
    "pyg_gat",
    "monai_unet2d",
    "vp_vit",
    "tv_mobilenet_v3_small",
    "timm_convnextv2_atto",
    "cv_shufflenetv2_wd2",
    "yolo_v8n_classify",
)


def networks() -> dict[str, Builder]:
    """Name -> builder of every network whose package is installed."""
    found: dict[str, Builder] = {}
    for name in FILES:
        file = importlib.import_module(f"bench.zoo.{name}")
        package = getattr(file, "PACKAGE", "torch")
        if find_spec(package.partition(".")[0]) is not None:
            found.update(file.NETWORKS)
    return found


def load_packages() -> None:
    """Import what builders import, once, before processes are forked that would each do so."""
    for name in FILES:
        package = getattr(importlib.import_module(f"bench.zoo.{name}"), "PACKAGE", "torch")
        if find_spec(package.partition(".")[0]) is not None:
            importlib.import_module(package)
