"""What is measured, by name; read before anything is built, so nothing is imported here."""

from __future__ import annotations

from typing import Any

PRECISIONS = ("float32", "tf32")
RATES = {"float32": "matmul_gflops", "tf32": "matmul_tf32_gflops"}
"""precision -> what a matmul reaches in it, in a document's `rates_before`"""
NETWORKS = ("VGG19 b128", "ResNet32 b128", "ResNet50 b32", "MLP b256")
FAMILIES = (
    "covariance",
    "inverses",
    "power iteration",
    "saliency",
    "greedy selection",
    "matrix-free power iteration",
)
TRAINED = {"resnet20": (32, 3), "vgg19_bn": (32, 3), "mlp": (28, 1)}
"""network of flatprune -> side and channels of the images"""
WHOLE_RUNS = {"resnet18": (8,) * 4, "vgg16_bn": (8,) * 13}
"""network of flatprune -> its widths in a dry run"""
KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": {"amp": "bf16"},
    "bf16, channels_last": {"amp": "bf16", "channels_last": True},
}
"""precision of a training step -> settings; float32 without tf32"""
