"""An explicit layer loop over a transformers decoder, so that a pass can pause at any layer and go on or stop.

transformers runs all layers in one call. We read the router's heads in the middle of that call and may never run the
rest, so the loop is ours; embeddings, layers, rotary tables, masks and norm are the family's own modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from hhh_router.errors import BundleError
from hhh_router.model.extension import Extension
from hhh_router.model.slots import Opening, Slots, Step

SUPPORTED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
"""transformers ``model_type`` values whose loop this file reproduces; a test compares each with transformers' own."""


@dataclass(slots=True)
class Pass:
    """One forward pass under way."""

    hidden: Tensor
    """States entering ``next_layer``, shape (B, T, D), the backbone's dtype."""
    position_ids: Tensor
    """(B, T)"""
    masks: dict[str, Tensor | None]
    """Layer type → attention mask as the family's layers want it."""
    rotary: dict[str, tuple[Tensor, Tensor]]
    """Layer type → cosines and sines."""
    cache: Cache | Opening | Step | Extension | None
    next_layer: int = 0


class DecoderStack:
    """A decoder-only backbone, layer by layer."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Wrap a ``…ForCausalLM`` model.

        Raises:
            BundleError: The family's loop is not reproduced here.
        """
        family = model.config.model_type
        if family not in SUPPORTED_FAMILIES:
            raise BundleError(
                f"backbone family {family!r} is not supported",
                hint=f"supported: {', '.join(SUPPORTED_FAMILIES)}",
            )
        self.model = model
        self.config = model.config
        self.text = model.model
        self.layers = self.text.layers
        self._layer_types = _layer_types(model.config)
        self._windows = {"full_attention": None, "sliding_attention": getattr(model.config, "sliding_window", None)}

    @property
    def depth(self) -> int:
        """Number of decoder layers, L."""
        return len(self.layers)

    @property
    def attends_to_all(self) -> bool:
        """True when every layer attends to all earlier tokens, so that a cache holds the whole past."""
        return set(self._layer_types) == {"full_attention"}

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that the model's own settings end a reply with."""
        listed = self.model.generation_config.eos_token_id
        return frozenset(listed if isinstance(listed, list) else [] if listed is None else [listed])

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token, of all layers."""
        attention = self.config
        size = getattr(attention, "head_dim", None) or attention.hidden_size // attention.num_attention_heads
        width = self.text.embed_tokens.weight.element_size()
        return 2 * self.depth * int(attention.num_key_value_heads) * size * width

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.text.embed_tokens.weight.device

    def new_cache(self) -> Cache:
        """An empty key-value cache for one batch."""
        return DynamicCache(config=self.config)

    def begin(self, input_ids: Tensor, *, attention_mask: Tensor | None = None, cache: Cache | None = None) -> Pass:
        """Embed tokens and prepare masks; no layer has run yet.

        Args:
            input_ids: (B, T), new tokens only when ``cache`` holds earlier ones.
            attention_mask: 1 for tokens, 0 for padding, (B, past + T); None when nothing is padded.
            cache: Filled by the layers as they run; None when the pass will not be continued.
        """
        embeds = self.text.embed_tokens(input_ids)  # (B, T, D); Gemma scales inside the embedding
        past = cache.get_seq_length() if cache is not None else 0
        if attention_mask is None:
            position_ids = torch.arange(past, past + input_ids.shape[1], device=embeds.device)[None]
        else:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, past:]
        mask_inputs: dict[str, Any] = {
            "config": self.config,
            "inputs_embeds": embeds,
            "attention_mask": attention_mask,
            "past_key_values": cache,
            "position_ids": position_ids,
        }
        builders = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        kinds = set(self._layer_types)
        return Pass(
            hidden=embeds,
            position_ids=position_ids,
            masks={kind: builders[kind](**mask_inputs) for kind in kinds},
            rotary={kind: self._rotary(embeds, position_ids, kind) for kind in kinds},
            cache=cache,
        )

    def resume(
        self,
        past: int,
        cache: Opening,
        *,
        input_ids: Tensor | None = None,
        hidden: Tensor | None = None,
        layer: int = 0,
    ) -> Pass:
        """Go on behind tokens whose keys and values the cache has; no further layer has run yet.

        Args:
            past: So many tokens.
            cache: Has them, for every layer from ``layer`` on that will run.
            input_ids: The tokens that follow, (1, T); or
            hidden: their states entering ``layer``, (1, T, D).
            layer: Where to go on.
        """
        states = self.text.embed_tokens(input_ids) if hidden is None else hidden
        length = states.shape[1]
        position_ids = torch.arange(past, past + length, device=states.device)[None]
        cache.past = past
        kinds = set(self._layer_types)
        return Pass(
            hidden=states,
            position_ids=position_ids,
            masks={kind: self._mask(self._causal(past, length, self._windows[kind]), states.dtype) for kind in kinds},
            rotary={kind: self._rotary(states, position_ids, kind) for kind in kinds},
            cache=cache,
            next_layer=layer,
        )

    def _causal(self, past: int, length: int, window: int | None) -> Tensor:
        """Which places each of the new tokens attends to, (1, 1, T, past + T)."""
        own = torch.arange(past, past + length, device=self.device)[:, None]
        place = torch.arange(past + length, device=self.device)[None]
        seen = place <= own
        if window is not None:
            seen &= place > own - window
        return seen[None, None]

    def step(self, tokens: Sequence[int], slots: Slots, rows: Sequence[int]) -> Pass:
        """Embed one new token of some of the rows in ``slots``, and prepare masks; no layer has run yet."""
        embeds = self.text.embed_tokens(torch.tensor(tokens, device=self.device)[:, None])
        cache = slots.step(rows)
        position_ids = torch.tensor(cache.lengths, device=self.device)[:, None]
        kinds = set(self._layer_types)
        return Pass(
            hidden=embeds,
            position_ids=position_ids,
            masks={kind: self._mask(cache.visible(self._windows[kind], self.device), embeds.dtype) for kind in kinds},
            rotary={kind: self._rotary(embeds, position_ids, kind) for kind in kinds},
            cache=cache,
        )

    def extend(self, rows: Sequence[Sequence[int]], cache: Extension) -> Pass:
        """Embed further tokens of several texts, and prepare masks; no layer has run yet."""
        ids, _ = self.padded(rows)
        if not any(cache.past) and len(set(cache.lengths)) == 1:  # attention needs no mask then, and is faster
            state = self.begin(ids)
            state.cache = cache
            return state
        embeds = self.text.embed_tokens(ids)
        position_ids = cache.positions(self.device)
        kinds = set(self._layer_types)
        return Pass(
            hidden=embeds,
            position_ids=position_ids,
            masks={kind: self._mask(cache.visible(self._windows[kind], self.device), embeds.dtype) for kind in kinds},
            rotary={kind: self._rotary(embeds, position_ids, kind) for kind in kinds},
            cache=cache,
        )

    def _mask(self, seen: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """What is seen, as this model's attention takes it."""
        if seen is None or self.config._attn_implementation != "eager":
            return seen
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)

    def padded(self, rows: Sequence[Sequence[int]], *, left: bool = False) -> tuple[Tensor, Tensor]:
        """Token ids of several rows as one batch, and which of them count: both (B, T), on the weights' device.

        Args:
            rows: Tokens of each row.
            left: Pad before the row, so that all rows end at one place; else behind it.
        """
        longest = max(map(len, rows))
        ids = torch.zeros((len(rows), longest), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            place = slice(longest - len(row), None) if left else slice(len(row))
            ids[i, place] = torch.tensor(list(row))
            mask[i, place] = 1
        return ids.to(self.device), mask.to(self.device)

    def run(self, state: Pass, stop: int) -> Tensor:
        """Run layers ``state.next_layer`` to ``stop`` (exclusive); the states entering layer ``stop``, (B, T, D)."""
        for index in range(state.next_layer, stop):
            kind = self._layer_types[index]
            state.hidden = self.layers[index](
                state.hidden,
                attention_mask=state.masks[kind],
                position_embeddings=state.rotary[kind],
                position_ids=state.position_ids,
                past_key_values=state.cache,
                use_cache=state.cache is not None,
            )
        state.next_layer = max(state.next_layer, stop)
        return state.hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits of states that left the last layer: (..., D) → (..., V)."""
        logits = self.model.lm_head(self.text.norm(hidden))
        cap = getattr(self.config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits

    def _rotary(self, embeds: Tensor, position_ids: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        if self.config.model_type == "gemma3_text":
            return self.text.rotary_emb(embeds, position_ids, kind)
        return self.text.rotary_emb(embeds, position_ids)


def _layer_types(config: Any) -> list[str]:
    """Attention kind per layer, as each family's own forward chooses it."""
    depth = config.num_hidden_layers
    if config.model_type == "mistral":
        return ["full_attention" if config.sliding_window is None else "sliding_attention"] * depth
    if config.model_type in ("llama", "gemma"):
        return ["full_attention"] * depth
    return list(config.layer_types)
