"""A small vision transformer (Dosovitskiy et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatprune.errors import InputError
from flatprune.models.shapes import checked_widths, need_size

VIT_WIDTHS = (96, 192)
PATCH_SIZE, HEAD_DIM, DEPTH = 4, 16, 6


class SelfAttention(nn.Module):
    """Multi-head self-attention of as many heads of `head_dim` as its projections have rows for."""

    def __init__(self, features: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(features, 3 * features)
        self.proj = nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [n, t, features] to [n, t, features]."""
        q, k, v = self.qkv(x).unflatten(2, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)  # [n, heads, t, head_dim]
        return self.proj(mixed.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Attention and a perceptron, each behind a layer norm and beside a shortcut."""

    def __init__(self, features: int, hidden: int, head_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(features)
        self.attn = SelfAttention(features, head_dim)
        self.norm2 = nn.LayerNorm(features)
        self.mlp = nn.Sequential(nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, features))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [n, t, features] to [n, t, features]."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Patches of 4x4 pixels as tokens, learned positions, blocks, the mean of the tokens, one linear layer."""

    def __init__(self, image_shape: tuple[int, int, int], classes: int, features: int, hidden: int) -> None:
        super().__init__()
        channels, *size = image_shape
        padding = [(-side % PATCH_SIZE + 1) // 2 for side in size]  # zeros around sides that are no multiple of 4
        tokens = [(side + 2 * pad) // PATCH_SIZE for side, pad in zip(size, padding)]
        self.patches = nn.Conv2d(channels, features, PATCH_SIZE, stride=PATCH_SIZE, padding=(padding[0], padding[1]))
        self.positions = nn.Parameter(torch.empty(1, tokens[0] * tokens[1], features).normal_(std=0.02))
        self.blocks = nn.Sequential(*(TransformerBlock(features, hidden, HEAD_DIM) for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(features)
        self.head = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes] of images [n, channels, h, w]."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def vit_tiny(image_shape: tuple[int, int, int], classes: int, widths: Sequence[int] | None = None) -> nn.Module:
    """A vision transformer of six blocks with heads of 16; `widths` = (96, 192): tokens, and the perceptrons within.

    The width of the tokens is a multiple of 16 before pruning.
    """
    need_size("vit_tiny", image_shape)
    features, hidden = checked_widths("vit_tiny", widths, VIT_WIDTHS)
    if features % HEAD_DIM:
        raise InputError(f"widths of vit_tiny: tokens of {features} features, expected a multiple of {HEAD_DIM}")
    return VisionTransformer(image_shape, classes, features, hidden)
