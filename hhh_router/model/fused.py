"""Decoder layers in fewer, larger operations, for a model that only serves.

A decode step of a small model is mostly small operations: seven matrix products a layer, each adapted one with three
more behind it, rotary positions for queries and keys apart. Here q, k and v are one product, gate and up another, and
the experts' updates of either are one, their first factors further outputs of the layer's own product
(`hhh_router.model.mixture`). What a layer computes is the family's own, but for the order of rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hhh_router.model.mixture import Gates, fold, joined

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""transformers ``model_type`` values whose layers are fused; those of others stay as they are."""


def fuse(model: PreTrainedModel, gates: Gates) -> bool:
    """Replace a model's decoder layers in place, after `install_mixture`; the old ones must not be used again.

    Returns:
        False where the family, or its attention, is not one that is fused here: then nothing was changed.
    """
    if model.config.model_type not in FAMILIES or model.config._attn_implementation != "sdpa":
        return False
    turn, layers = _Turn(), model.model.layers
    for index in range(len(layers)):
        layers[index] = FusedLayer(layers[index], gates, turn)
    return True


class FusedLayer(nn.Module):
    """One pre-norm layer with rotary positions, grouped attention and a gated MLP; called as transformers calls one."""

    def __init__(self, layer: Any, gates: Gates, turn: _Turn) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.layer_idx = attention.layer_idx
        self.is_causal = True  # this and the next are what transformers' attention asks a module for
        self.num_key_value_groups = attention.num_key_value_groups
        self._scaling, self._size = attention.scaling, attention.head_dim
        self._turn = turn
        self.qkv = fold(joined([attention.q_proj, attention.k_proj, attention.v_proj], gates))
        self.o = fold(attention.o_proj)
        self.gate_up = fold(joined([mlp.gate_proj, mlp.up_proj], gates))
        self.down = fold(mlp.down_proj)
        self.act_fn = mlp.act_fn
        self.input_layernorm = layer.input_layernorm
        self.post_attention_layernorm = layer.post_attention_layernorm
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        config = attention.config
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads

    def forward(
        self,
        hidden: Tensor,
        *,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Any = None,
        **_: Any,
    ) -> Tensor:
        """States entering the next layer, (B, T, D) → (B, T, D), a tensor of their own."""
        rows, length, _width = hidden.shape
        found = self.qkv(_norm(self.input_layernorm, hidden)).view(rows, length, -1, self._size)
        turned = found[:, :, : self._heads + self._kv_heads]
        if self.q_norm is not None:
            turned = torch.cat([self.q_norm(turned[:, :, : self._heads]), self.k_norm(turned[:, :, self._heads :])], 2)
        turned = self._turn(turned, *position_embeddings).transpose(1, 2)  # (B, H, T, d)
        queries, keys = turned[:, : self._heads], turned[:, self._heads :]
        values = found[:, :, self._heads + self._kv_heads :].transpose(1, 2)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx)
        attended = self._attended(queries, keys, values, attention_mask)
        between = self.o(attended.reshape(rows, length, -1))
        between += hidden
        gate, up = self.gate_up(_norm(self.post_attention_layernorm, between)).chunk(2, dim=-1)
        after = self.down(self.act_fn(gate).mul_(up))
        after += between
        return after

    def _attended(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, H, d). With a mask transformers copies keys and values for every head, as CUDA's kernels want it."""
        if mask is None or queries.shape[2] == 1 or queries.device.type != "cpu":
            return sdpa_attention_forward(self, queries, keys, values, mask, scaling=self._scaling)[0]
        attended = torch.nn.functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=self._scaling, enable_gqa=True
        )
        return attended.transpose(1, 2)


def _norm(of: Any, x: Tensor) -> Tensor:
    """The family's RMS norm in one call, rounded once where its own module rounds before it scales, too."""
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), of.weight, of.variance_epsilon)


class _Turn:
    """Rotary positions (Su et al. 2021). What depends on positions alone, signs included, is made once a pass."""

    def __init__(self) -> None:
        self._of: Tensor | None = None
        self._cosines = self._sines = torch.empty(0)

    def __call__(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Turn (B, T, H, d) by cosines and sines, (B or 1, T, d)."""
        half = x.shape[-1] // 2
        if self._of is not sines:
            self._of, self._cosines = sines, cosines[:, :, None]
            self._sines = torch.cat([-sines[..., :half], sines[..., half:]], dim=-1)[:, :, None]
        return (x * self._cosines).add_(x.roll(half, dims=-1).mul_(self._sines))
