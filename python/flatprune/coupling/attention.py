"""`nn.MultiheadAttention` whose number of heads, their size and the width of its inputs are three things."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PrunableAttention(nn.MultiheadAttention):
    """The same parameters, names and results as `nn.MultiheadAttention`, in a forward that follows their shapes.

    torch's own forward wants embed_dim = num_heads head_dim; here heads can go while the width stays and the other way
    round. It never takes torch's fused inference path.

    Attributes:
        head_dim: of queries and keys; stays.

    Example:
        >>> layer = PrunableAttention.of(nn.MultiheadAttention(16, 4))
        >>> layer.head_dim
        4
    """

    @classmethod
    def of(cls, module: nn.MultiheadAttention) -> PrunableAttention:
        """The module itself, as one of this class; tensors, hooks and attributes stay."""
        module.__class__ = cls
        module._qkv_same_embed_dim = False  # what torch asks before it takes the fused path of an encoder layer
        return module  # type: ignore[return-value]

    def sizes(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """Attributes that follow from the shapes of its tensors."""
        if "in_proj_weight" in shapes:
            rows, width = shapes["in_proj_weight"][0] // 3, shapes["in_proj_weight"][1]
        else:
            rows, width = shapes["q_proj_weight"]
        return {"num_heads": rows // self.head_dim, "embed_dim": width}

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`; `is_causal` only says of a mask that it is causal."""
        if is_causal and attn_mask is None:
            raise RuntimeError("PrunableAttention: is_causal is True and attn_mask None, expected the causal mask too")
        batched, same = query.dim() == 3, query is key and key is value
        if not self.batch_first and batched:
            query, key, value = (
                (query.transpose(0, 1),) * 3 if same else (t.transpose(0, 1) for t in (query, key, value))
            )
        if not batched:
            query, key, value = (query[None],) * 3 if same else (t[None] for t in (query, key, value))
        q, k, v = (self._by_head(t) for t in self._projected(query, key, value, same))
        k, v, grown = self._with_extra_positions(k, v)
        mask = self._mask(q, k, attn_mask, key_padding_mask, grown)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.mT * self.head_dim**-0.5
            weights = (scores if mask is None else scores + mask).softmax(dim=-1)
            mixed = F.dropout(weights, dropout) @ v if dropout else weights @ v
        else:
            weights, mixed = None, F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return output[0], None if weights is None else weights[0]
        return output if self.batch_first else output.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor, same: bool) -> Sequence[Tensor]:
        if self.in_proj_weight is not None and same:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [F.linear(t, weight, bias) for t, weight, bias in zip((query, key, value), weights, biases)]

    def _by_head(self, t: Tensor) -> Tensor:
        """[N, T, heads head_dim] as [N, heads, T, head_dim]."""
        return t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _with_extra_positions(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Keys and values with the learned and the zero position behind them, and how many there are."""
        grown = 0
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([t, self._by_head(bias.transpose(0, 1)).expand(len(t), -1, -1, -1)], dim=2)
                for t, bias in ((k, self.bias_k), (v, self.bias_v))
            )
            grown += 1
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            grown += 1
        return k, v, grown

    def _mask(
        self, q: Tensor, k: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, grown: int
    ) -> Tensor | None:
        """What is added to the scores [N, heads, T, S]."""
        mask = None
        if attn_mask is not None:
            mask = _additive(attn_mask, q)
            mask = F.pad(mask, (0, grown)) if grown else mask
            mask = mask.unflatten(0, (len(q), -1)) if mask.dim() == 3 else mask
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q)
            padding = F.pad(padding, (0, grown)) if grown else padding
            padding = padding.view(-1, 1, 1, k.shape[2])
            mask = padding if mask is None else mask + padding
        return mask


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """A mask, True where attention is forbidden, as what is added to the scores."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return like.new_zeros(mask.shape).masked_fill(mask, float("-inf"))


def make_prunable(model: nn.Module) -> list[nn.MultiheadAttention]:
    """Give every `nn.MultiheadAttention` of a model the forward that follows its shapes.

    Returns:
        The modules that were changed, for `undo_prunable`.
    """
    changed = [module for module in model.modules() if type(module) is nn.MultiheadAttention]
    for module in changed:
        PrunableAttention.of(module)
    for encoder in model.modules():
        if changed and isinstance(encoder, nn.TransformerEncoder):
            encoder.use_nested_tensor = False  # the fused path alone takes these
    return changed


def undo_prunable(modules: Sequence[nn.MultiheadAttention]) -> None:
    """Take it back; encoders go on without nested tensors, which changes no result."""
    for module in modules:
        module.__class__ = nn.MultiheadAttention
        module._qkv_same_embed_dim = module.in_proj_weight is not None
